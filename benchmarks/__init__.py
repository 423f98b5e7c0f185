"""Measurements that the documentation quotes; each prints a table."""

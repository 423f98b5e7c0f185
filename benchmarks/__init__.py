"""Measurements that the documentation quotes. Each module prints a table."""

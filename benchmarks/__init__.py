"""Measurements quoted in the documentation; each prints a table."""

"""Runs, sweeps and records read from disk: a list of runs, and a page that compares them."""

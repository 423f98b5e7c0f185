"""Sweeps (`-m`): jobs, launchers and tables."""

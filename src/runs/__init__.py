"""Run folders, atomic file writes, and information about the machine and its processes."""

"""Run folders: what lies where, atomic files, the machine."""

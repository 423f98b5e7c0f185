"""Image data: sources, the epoch-less training stream, and the ranges [0, 255] <-> [-1, 1]."""

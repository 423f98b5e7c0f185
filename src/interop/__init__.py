"""Weights and layouts of other libraries, in and out."""

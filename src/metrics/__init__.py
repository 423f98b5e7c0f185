"""Scores of generated images: feature spaces, distances between sets, and the protocol of a score."""

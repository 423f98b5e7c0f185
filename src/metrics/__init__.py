"""Scores of generated images: feature spaces, distances between sets of images, and the protocol of a score."""

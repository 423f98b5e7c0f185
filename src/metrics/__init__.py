"""Scores of generated images: feature spaces and distances between sets of images."""

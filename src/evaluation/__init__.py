"""Scores of generated images, likelihoods, and the records in which they are stored."""

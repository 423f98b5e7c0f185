"""Scores of images and of likelihood, and the record that is stored beside them."""

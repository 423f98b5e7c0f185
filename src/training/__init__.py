"""Training with Lightning: the module, the average of its weights, checkpoints and callbacks."""

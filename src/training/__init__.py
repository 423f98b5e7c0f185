"""Training with Lightning: the module, weight averages, checkpoints and callbacks."""

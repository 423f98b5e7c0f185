"""How images are made from a trained denoiser: the recipe, the tasks of `src.sample`, pictures."""

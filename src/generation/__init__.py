"""Image generation from a trained denoiser: the recipe, the tasks of `src.sample`, and image files."""

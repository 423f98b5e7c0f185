"""An experiment framework for image diffusion models; docs/design.md describes its design."""

"""An experiment framework for image diffusion models; docs/design.md is its plan."""

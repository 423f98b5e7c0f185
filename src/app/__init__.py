"""The only package that knows Hydra: the command line, options, building objects, jobs."""

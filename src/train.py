"""Train a diffusion model: python -m src.train schedule=cosine model=unet_small (see --help)."""

from src.app.cli import run


def main() -> None:
    """Runs the command line."""
    run("train")


if __name__ == "__main__":
    main()

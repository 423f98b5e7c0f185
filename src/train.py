"""Train a diffusion model: python -m src.train schedule=cosine model=unet_small (see --help)."""

if not __package__:
    raise SystemExit("error: start it from the repository's folder as python -m src.train")

from src.app.cli import run


def main() -> None:
    """Runs the command line."""
    run("train")


if __name__ == "__main__":
    main()

"""What a training would cost, without training: python -m src.plan schedule=cosine model=unet_small (or with -m)."""

if not __package__:
    raise SystemExit("error: start it from the repository's folder as python -m src.plan")

from src.app.cli import run


def main() -> None:
    """Runs the command line."""
    run("plan")


if __name__ == "__main__":
    main()

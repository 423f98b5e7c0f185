"""Sample images from a trained run: python -m src.sample run=<run folder or checkpoint> n=64 (see --help)."""

if not __package__:
    raise SystemExit("error: start it from the repository's folder as python -m src.sample")

from src.app.cli import run


def main() -> None:
    """Runs the command line."""
    run("sample")


if __name__ == "__main__":
    main()

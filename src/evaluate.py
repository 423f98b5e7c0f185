"""Score a trained run: python -m src.evaluate run=<run folder or checkpoint> (see --help)."""

if not __package__:
    raise SystemExit("error: start it from the repository's folder as python -m src.evaluate")

from src.app.cli import run


def main() -> None:
    """Runs the command line."""
    run("evaluate")


if __name__ == "__main__":
    main()

"""The best recipe for one checkpoint: python -m src.search run=...."""

if not __package__:
    raise SystemExit("error: start it from the repository's folder as python -m src.search")

from src.app.cli import run


def main() -> None:
    """Runs the command line."""
    run("search")


if __name__ == "__main__":
    main()

"""Which choice of the evaluation explains a score: python -m src.explain run=...."""

if not __package__:
    raise SystemExit("error: start it from the repository's folder as python -m src.explain")

from src.app.cli import run


def main() -> None:
    """Runs the command line."""
    run("explain")


if __name__ == "__main__":
    main()

"""A list of runs: python -m src.runs best=fd_digits schedule=cosine (see --help)."""

from src.app.cli import run


def main() -> None:
    """Runs the command line."""
    run("runs")


if __name__ == "__main__":
    main()

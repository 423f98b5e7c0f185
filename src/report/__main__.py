"""One page that compares runs: python -m src.report <runs, sweeps, records> out=report.html (see --help)."""

from src.app.cli import run


def main() -> None:
    """Runs the command line."""
    run("report")


if __name__ == "__main__":
    main()

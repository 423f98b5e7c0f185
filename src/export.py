"""A run's network for other libraries: python -m src.export run=<run> format=diffusers out=<folder> (see --help)."""

if not __package__:
    raise SystemExit("error: start it from the repository's folder as python -m src.export")

from src.app.cli import run


def main() -> None:
    """Runs the command line."""
    run("export")


if __name__ == "__main__":
    main()

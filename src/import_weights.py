"""A run from the weights of other code: python -m src.import_weights source=... out=... data=... (see --help)."""

if not __package__:
    raise SystemExit("error: start it from the repository's folder as python -m src.import_weights")

from src.app.cli import run


def main() -> None:
    """Runs the command line."""
    run("import_weights")


if __name__ == "__main__":
    main()

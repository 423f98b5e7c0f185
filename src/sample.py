"""Draw images from a trained run: python -m src.sample run=<run folder or checkpoint> n=64 (see --help)."""

from pathlib import Path
from typing import Any

from src.app.cli import run
from src.errors import UserError
from src.runs.files import write_json
from src.runs.folder import recipe_folder


def sample(config: Any) -> dict[str, float]:
    """Draws what conf/task says, beside a record of the recipe.

    Args:
        config: conf/sample.yaml, composed.

    Returns:
        Nothing: pictures have no score.
    """
    import logging

    from src.app.build import build, named
    from src.app.load import load_with
    from src.generation.recipe import describe, warn_of_missing_signal
    from src.generation.tasks import Task

    task = build(config.task, Task, "task")
    loaded = load_with(config)
    if task.from_noise:
        warn_of_missing_signal(loaded.denoiser, loaded.generation)
    asked = {"task": describe(task), "n": config.n}
    folder = Path(config.out or recipe_folder(loaded.found.folder / "samples", {**asked, **loaded.recipe()}))
    try:
        lines = task.run(loaded, config.n, config.batch_size, folder)
    except ValueError as error:
        if named(error) not in config.task:
            raise
        raise UserError(f"task.{error}") from None
    write_json(folder / "recipe.json", {**asked, **loaded.recipe()})
    lines.append(f"evaluations {loaded.generation.network_evaluations} of the network for an image")
    logging.getLogger(__name__).info("%s", "\n".join(lines))
    return {}


def main() -> None:
    """The command line."""
    run("sample", sample)


if __name__ == "__main__":
    main()

"""The job of `src.sample`: one task with a trained run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from src.app.build import build, class_of, named
from src.app.launch import launch
from src.app.load import load_with
from src.diffusion.restoration import Restoration
from src.errors import UserError
from src.generation.recipe import describe, warn_of_missing_signal
from src.generation.restore import Restore
from src.generation.tasks import Task
from src.runs.files import write_json
from src.runs.folder import recipe_folder
from src.runs.processes import rank

log = logging.getLogger(__name__)


def sample(config: DictConfig) -> dict[str, float]:
    """Runs the task of conf/task and writes a record of the recipe beside its results, with one process or several.

    Args:
        config: conf/sample.yaml, composed.

    Returns:
        Nothing: pictures have no score.
    """
    task = task_of(config)
    if config.devices > 1 and not task.shared:
        raise UserError(
            f"devices={config.devices}: {type(task).__name__} runs in one process; choose devices=1"
        )
    for option in ("labels", "prompts"):
        if task.own_condition and config[option] is not None:
            files = ", or give files in task.images" if hasattr(task, "images") else ""
            raise UserError(
                f"{option}={config[option]}: {type(task).__name__} conditions on the classes and texts of the data's"
                f" images; leave {option} out{files}"
            )
    return launch(sample_on_this_process, config)


def sample_on_this_process(config: DictConfig) -> dict[str, float]:
    """The share of this process; see `sample`."""
    task = task_of(config)
    loaded, _ = load_with(config)
    if task.from_noise and rank() == 0:
        warn_of_missing_signal(loaded.denoiser, loaded.recipe)
    asked = {"task": describe(task), "n": config.n}
    named_by = {**asked, **loaded.record(evaluations=0)}
    name = type(task).__name__.lower()
    folder = Path(config.out or recipe_folder(loaded.found.folder / "samples", named_by, name))
    with naming_options(config):
        made = task.run(loaded, config.n, config.batch_size, folder)
    if rank() == 0:
        write_json(folder / "recipe.json", {**asked, **loaded.record(made.evaluations), **made.record})
        lines = [*made.lines, f"evaluations {made.evaluations} of the network for an image"]
        log.info("%s", "\n".join(lines))
    return {}


@contextmanager
def naming_options(config: DictConfig) -> Iterator[None]:
    """Within it, a ValueError that begins with an option of the task or the restoration names that option."""
    try:
        yield
    except ValueError as error:
        for option in ("task", "restoration"):
            if named(error) in (config.get(option) or {}):
                raise UserError(f"{option}.{error}") from None
        raise


def task_of(config: DictConfig) -> Task:
    """The task, with its restoration if it takes one, checked as far as that is possible without the run.

    Raises:
        UserError: a restoration was chosen that has no effect on the task, or an option is invalid.
    """
    restoration = build(config.get("restoration"), Restoration, "restoration")
    if issubclass(class_of(config.task) or Task, Restore):
        task = build(config.task, Task, "task", restoration=restoration)
        steps = OmegaConf.select(config, "sampler.steps")
        if isinstance(steps, int) and steps > 0:  # others are reported with the sampler
            with naming_options(config):
                task.prepare(steps)
        return task
    task = build(config.task, Task, "task")
    if restoration is not None:
        raise UserError(
            f"restoration has no effect on {type(task).__name__}: choose restoration=null, or task=inpaint, deblur or"
            " upsample"
        )
    return task

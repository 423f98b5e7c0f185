"""Train a diffusion model: python -m src.train schedule=cosine model=unet_small (see --help)."""

import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from src.app.cli import run
from src.app.overrides import in_override, resume_overrides, write_overrides
from src.runs.files import write_json
from src.runs.folder import CHECKPOINTS, ENVIRONMENT_FILE, find_run, locked
from src.runs.machine import environment, is_first_process


def train(config: Any) -> dict[str, float]:
    """Trains one run in Hydra's run folder.

    Args:
        config: conf/train.yaml, composed.

    Returns:
        The last scores and validation losses by name.
    """
    from hydra.core.hydra_config import HydraConfig

    folder = Path(HydraConfig.get().runtime.output_dir)
    if folder.is_relative_to(Path.cwd()):  # shorter to read and to type
        folder = folder.relative_to(Path.cwd())
    with locked(folder) if is_first_process() else nullcontext():
        return train_in(folder, config)


def train_in(folder: Path, config: Any) -> dict[str, float]:
    """Trains one run in this folder; see `train`."""
    import logging

    from hydra.core.hydra_config import HydraConfig

    from src.app import assemble as experiment
    from src.training.dashboard import finish_dashboards
    from src.training.distributed import leave

    parts = experiment.assemble(config, folder)
    parts.check_resume()  # a training that is refused leaves the folder as it was
    log = logging.getLogger(__name__)
    log.info("run         %s\n%s", folder, parts.summary)
    record = environment()
    is_main = parts.trainer.is_global_zero
    if is_main:
        write_overrides(folder, list(HydraConfig.get().overrides.task))
        experiment.write_config(config, folder)
        write_json(folder / ENVIRONMENT_FILE, record)
    for logger in parts.trainer.loggers:
        logger.log_hyperparams({**experiment.resolve(config, "config"), "environment": record})
    try:
        parts.trainer.fit(parts.module, parts.data, ckpt_path=parts.checkpoint, weights_only=True)
    finally:
        finish_dashboards()
        leave()
    scores = parts.scores()
    if is_main:
        write_json(folder / "scores.json", scores)
        log.info("%s", closing_summary(folder, parts.trainer.global_step, scores))
    return scores


def closing_summary(folder: Path, step: int, scores: dict[str, float]) -> str:
    """What came out of a training, and the exact commands that go on from it."""
    results = {name: f"{value:.4g}" for name, value in scores.items()}
    grids = sorted((folder / "samples").glob("step_*.png"))
    if grids:
        results["pictures"] = str(grids[-1])
    following = []
    if (folder / CHECKPOINTS).is_dir():
        results["checkpoint"] = str(find_run(folder).checkpoint)
        run_option, ckpt_option = (
            shlex.quote(f"{option}={in_override(folder)}") for option in ("run", "ckpt")
        )
        following = [
            "Next:",
            f"  python -m src.sample {run_option} sampler=ddim sampler.steps=50 n=64 seed=0",
            f"  python -m src.evaluate {run_option}",
            f"  python -m src.train {ckpt_option} trainer.max_steps={2 * step}",
        ]
    width = max(map(len, results), default=0) + 2
    return "\n".join(
        ["\nDone.", *(f"  {name:<{width}}{value}" for name, value in results.items()), *following]
    )


def main() -> None:
    """The command line."""
    run("train", train, resume_overrides)


if __name__ == "__main__":
    main()

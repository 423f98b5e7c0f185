"""The job of `src.train`: one training in one run folder."""

import logging
import shlex
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from src.app.assemble import Experiment, assemble, has_several_processes, write_config
from src.app.budget import with_steps_of_budget
from src.app.build import resolve
from src.app.device_batch import with_fitting_batch
from src.app.environment import redacted
from src.app.options import effect_of
from src.app.overrides import given_again, in_override, own_arguments
from src.diffusion.autoencoder import Autoencoder
from src.diffusion.denoiser import Denoiser
from src.errors import UserError
from src.evaluation.record import Record
from src.runs.files import write_json
from src.runs.folder import (
    BANDS_FILE,
    CHECKPOINTS,
    ENVIRONMENT_FILE,
    ERROR_FILE,
    INIT_FILE,
    SCORES_FILE,
    find_run,
    locked,
)
from src.runs.machine import environment, is_first_process
from src.runs.output import failures, forget_failures, tolerated
from src.training.dashboard import finish_dashboards
from src.training.distributed import explain_lost_process, leave
from src.training.resume import flat

log = logging.getLogger(__name__)


def train(config: DictConfig) -> dict[str, float]:
    """Trains one run in Hydra's run folder.

    Args:
        config: conf/train.yaml, composed.

    Returns:
        The last scores and validation losses by name, and the network's evaluations for a scored image.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    if folder.is_relative_to(Path.cwd()):  # shorter to read and to type
        folder = folder.relative_to(Path.cwd())
    with locked(folder) if is_first_process(has_several_processes(config)) else nullcontext():
        config = with_steps_of_budget(with_fitting_batch(config, folder), folder)
        experiment = assemble(config, folder)
        experiment.check_resume()  # a refused training leaves the folder as it was
        return fit(experiment, config, folder)


def fit(experiment: Experiment, config: DictConfig, folder: Path) -> dict[str, float]:
    """Runs a training, records what it depends on, and prints what came out."""
    trainer = experiment.trainer
    log.info("run         %s\n%s", folder, experiment.summary)
    record = environment()
    if trainer.is_global_zero:
        source = experiment.data.source
        if source.num_classes:  # which label is which class
            source.prepare()
            record["classes"] = list(source.class_names)
        record["parameters"] = sum(p.numel() for p in experiment.module.denoiser.network.parameters())
        record["arguments"] = own_arguments(list(HydraConfig.get().overrides.task))  # for `requeued_run`
        write_config(config, folder)
        write_json(folder / ENVIRONMENT_FILE, record)
        if experiment.init is not None:
            write_json(folder / INIT_FILE, experiment.init)
        (folder / ERROR_FILE).unlink(missing_ok=True)
    forget_failures()
    for logger in trainer.loggers:
        logger.log_hyperparams({**resolve(config, "config"), "environment": record})
    try:
        trainer.fit(experiment.module, experiment.data, ckpt_path=experiment.checkpoint, weights_only=True)
        experiment.publish(folder)
    except UserError as error:
        keep_error(folder, str(error), trainer.is_global_zero)
        raise
    except Exception as error:
        keep_error(
            folder, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", trainer.is_global_zero
        )
        explain_lost_process(error)
        raise
    finally:
        finish_dashboards()
        leave()
    scores = experiment.scores()
    if trainer.is_global_zero:
        tracker = experiment.tracker
        latest = tracker.latest if tracker else None
        scored = replace(latest, scores=scores) if latest else Record(scores, {})
        scored.write(folder / SCORES_FILE)
        log.info(
            "%s",
            closing_summary(folder, trainer.global_step, scored, config, experiment.module.denoiser),
        )
        if latest is not None:
            return {**scores, "evaluations": latest.protocol["recipe"]["network_evaluations"]}
    return scores


def keep_error(folder: Path, line: str, is_global_zero: bool) -> None:
    """Writes why a training failed, for the list of runs."""
    if is_global_zero:
        with tolerated(ERROR_FILE):
            write_json(folder / ERROR_FILE, {"error": redacted(line)})


def closing_summary(folder: Path, step: int, scored: Record, config: DictConfig, denoiser: Denoiser) -> str:
    """The results of a training, and the exact commands that continue from it."""
    results = {
        name: scored.printed(name) if scored.interval(name) else f"{value:.4g}"
        for name, value in scored.scores.items()
    }
    grids = sorted((folder / "samples").glob("step_*.png"))
    if grids:
        results["pictures"] = str(grids[-1])
    if failed := failures():
        results["failed"] = ", ".join(f"{what} {times} times" for what, times in failed.items())
    if (folder / BANDS_FILE).exists():
        results["band"] = f"left, see {folder / BANDS_FILE}"
    following = []
    if (folder / CHECKPOINTS).is_dir():
        results["checkpoint"] = str(find_run(folder).checkpoint)
        run, ckpt = (shlex.quote(f"{option}={in_override(folder)}") for option in ("run", "ckpt"))
        trust = f"'trust=[{','.join(config.trust)}]' " if config.trust else ""
        following = ["Next:"]
        if denoiser.makes_images:
            following.append(f"  python -m src.sample {trust}{run} sampler=ddim sampler.steps=50 n=64 seed=0")
            if config.metrics:
                following.append(f"  python -m src.evaluate {trust}{run}")
        elif isinstance(denoiser, Autoencoder):
            following += [
                f"  python -m src.export {trust}{run} out=autoencoder",
                "  python -m src.train codec=autoencoder_kl codec.folder=autoencoder data=...",
            ]
        else:
            guide = shlex.quote(f"guidance.run={in_override(folder)}")
            following.append(
                f"  python -m src.sample {trust}run=... guidance=classifier {guide} guidance.scale=2"
            )
        again = [shlex.quote(each) for each in given_again(list(HydraConfig.get().overrides.task))]
        allow = ["allow_changes=true"] if changes_with_length(config, 2 * step) else []
        continued = " ".join([*again, ckpt, f"trainer.max_steps={2 * step}", *allow])
        following.append(f"  python -m src.train {continued}")
    width = max(map(len, results), default=0) + 2
    return "\n".join(
        ["\nDone.", *(f"  {name:<{width}}{value}" for name, value in results.items()), *following]
    )


def changes_with_length(config: DictConfig, max_steps: int) -> bool:
    """Whether options on which the results depend follow trainer.max_steps, e.g. that of a cosine schedule."""
    longer = deepcopy(config)
    longer.trainer.max_steps = max_steps
    before, after = (flat(resolve(each, "config")) for each in (config, longer))
    return any(effect_of(key) in ("tuning", "experiment") for key in before if before[key] != after[key])

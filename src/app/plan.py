"""The job of `src.plan`: what a training, or each of a sweep, would cost on this machine."""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from src.app.assemble import Experiment, assemble
from src.app.budget import WARM_UP, StopWatch, probe, with_steps_of_budget
from src.app.build import trusting
from src.app.device_batch import with_fitting_batch
from src.app.messages import check_names
from src.app.options import CONF, check_options
from src.app.overrides import trusted_folders, written_out
from src.app.sweep.jobs import combinations, composed
from src.diffusion.denoiser import Denoiser
from src.errors import UserError
from src.generation.recipe import Generated
from src.training.callbacks import SampleImages, TrackFidelity
from src.training.checkpoint import Checkpoints
from src.training.device_batch import peak_memory, reset_peak

# Evaluations of the network that are timed for previews and scores.
EVALUATIONS = 3
# Copies of the weights in a checkpoint besides the weights: two moments of Adam.
MOMENTS = 2


@dataclass(frozen=True)
class Cost:
    """What a training costs.

    Attributes:
        parameters: of the network.
        flops: floating-point operations of one forward pass of the network for one image.
        step: seconds of one optimiser step.
        steps: hours of all optimiser steps.
        validations, previews, scores, checkpoints: hours of these.
        memory: peak, in bytes: of the GPU, or of the process on the CPU.
        disk: of the run folder's checkpoints, in bytes.
    """

    parameters: int
    flops: int
    step: float
    steps: float
    validations: float
    previews: float
    scores: float
    checkpoints: float
    memory: int
    disk: int

    @property
    def hours(self) -> float:
        """From the first step to the end."""
        return self.steps + self.validations + self.previews + self.scores + self.checkpoints


def plan(arguments: Sequence[str]) -> int:
    """Prints what the training of a command line costs; with several values of an option, each job and the sum.

    Args:
        arguments: as of src.train, without -m.

    Returns:
        How many of the trainings are impossible.

    Raises:
        UserError: an option that does not exist.
    """
    overrides = [part for argument in arguments for part in written_out(argument)]
    check_names("train", overrides, [CONF, *trusted_folders(overrides)])
    known: dict[str, Cost] = {}
    rows: list[tuple[str, Cost | str]] = []
    for options, varied in combinations(overrides):
        config = composed("train", options)
        OmegaConf.set_struct(config, False)
        config.pop("hydra")
        alike = OmegaConf.to_yaml(
            OmegaConf.masked_copy(config, [k for k in config if k not in ("seed", "name")])
        )
        try:
            check_options("train", config)
            if alike not in known:
                print(f"measuring   {' '.join(varied) or 'a few steps'}")
                known[alike] = measured(config)
            rows.append((" ".join(varied), known[alike]))
        except UserError as error:
            rows.append((" ".join(varied), str(error)))
    _print(rows)
    return sum(isinstance(cost, str) for _, cost in rows)


def measured(config: DictConfig) -> Cost:
    """The cost of one training, from a few of its steps on this machine.

    Raises:
        UserError: the parts do not fit together.
    """
    with trusting(config.trust), tempfile.TemporaryDirectory() as folder:
        config = with_steps_of_budget(with_fitting_batch(config, Path(folder)), Path(folder))
        full = assemble(config, Path(folder))  # with its callbacks, of which the intervals are read
        device = full.trainer.strategy.root_device
        reset_peak()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        watch = StopWatch(device)
        experiment = probe(config, Path(folder), watch)
        step = statistics.fmean(watch.seconds[WARM_UP:])  # slow steps, e.g. those that log, count too
        saving = watch.time(partial(experiment.trainer.save_checkpoint, Path(folder, "probe.ckpt")))
        experiment.module.to(device)
        times = _callbacks(full, experiment, config, watch)
        times["checkpoints"] = saving * _saves(full, config.trainer.max_steps) / 3600
    max_steps = config.trainer.max_steps
    network = experiment.module.denoiser.network
    parameters = sum(p.numel() for p in network.parameters())
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    copies = 1 + MOMENTS + (experiment.module.ema is not None)
    kept = (config.callbacks or {}).get("checkpoints", {}).get("keep", 0) + (
        "track_fidelity" in (config.callbacks or {})
    )
    return Cost(
        parameters=parameters,
        flops=_flops(experiment),
        step=step,
        steps=step * max_steps / 3600,
        memory=memory,
        disk=4 * parameters * copies * kept,
        **times,
    )


def _callbacks(
    full: Experiment, experiment: Experiment, config: DictConfig, watch: StopWatch
) -> dict[str, float]:
    """Hours of validations, previews and scores."""
    steps = config.trainer.max_steps
    hours = {"validations": 0.0, "previews": 0.0, "scores": 0.0}
    data, module = experiment.data, experiment.module
    with torch.inference_mode(), module.averaged() as denoiser:
        source = data.source
        images = len(source.split("validation"))
        if images:
            batch = next(iter(data.val_dataloader())).to(module.device)
            x0 = module.encode(batch)
            level = denoiser.schedule(torch.full((len(x0),), denoiser.schedule.t_max / 2, device=x0.device))
            condition = (
                None if module.conditioning is None else module.conditioning.of_data(batch.condition, x0)
            )
            once = watch.time(lambda: denoiser.evaluate(x0, level, condition)) / len(x0)
            passes = 1 if module.ema is None else 2
            hours["validations"] = once * images * passes * (steps // config.validate_every) / 3600
        for callback in full.trainer.callbacks:
            if isinstance(callback, SampleImages) and callback.recipe is not None:
                seconds, times = _drawing(callback, denoiser, watch)[0], steps // callback.every
                hours["previews"] += seconds * times / 3600
            if isinstance(callback, TrackFidelity):
                callback.scores.to(module.device)
                seconds, images = _drawing(callback, denoiser, watch)
                scoring = watch.time(partial(callback.scores.update, images)) / len(images) * callback.n
                once = scoring / callback.n * callback.scores.reference_images(source, callback.cache)
                hours["scores"] += ((seconds + scoring) * _scorings(callback, steps) + once) / 3600
    return hours


def _scorings(callback: TrackFidelity, steps: int) -> int:
    """How often a training of so many steps is scored."""
    return steps // callback.every + (callback.at_end and steps % callback.every > 0)


def _saves(full: Experiment, steps: int) -> int:
    """How often a training of so many steps saves at most: at intervals, at the end, and after a score."""
    saves = 0
    for callback in full.trainer.callbacks:
        if isinstance(callback, Checkpoints):
            saves += -(-steps // callback.every)
        if isinstance(callback, TrackFidelity):
            saves += _scorings(callback, steps)
    return saves


def _drawing(
    callback: SampleImages | TrackFidelity, denoiser: Denoiser, watch: StopWatch
) -> tuple[float, Tensor]:
    """Seconds in which a callback draws its images, from a few evaluations of the network; and one batch of images."""
    n = min(callback.n, callback.batch_size)
    few = replace(callback.recipe, steps=EVALUATIONS)

    def draw() -> Generated:
        return next(few.images(denoiser, range(n), n))

    made = draw()
    per_evaluation = watch.time(draw) / made.evaluations
    evaluations = made.evaluations / EVALUATIONS * callback.recipe.steps
    return per_evaluation / n * evaluations * callback.n, made.images


def _flops(experiment: Experiment) -> int:
    """Of one forward pass for one image, counted by PyTorch."""
    module = experiment.module
    batch = next(iter(experiment.data.train_dataloader())).to(module.device)
    x0 = module.encode(batch)[:1]
    network, denoiser = module.denoiser.network, module.denoiser
    level = denoiser.schedule(torch.full((1,), denoiser.schedule.t_max / 2, device=x0.device))
    condition = (
        None
        if module.conditioning is None
        else module.conditioning.of_data(batch.condition, x0).index(slice(1))
    )
    was_training = network.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()
        denoiser.evaluate(x0, level, condition)
    network.train(was_training)
    return counter.get_total_flops()


def span(hours: float) -> str:
    """A length of time in a fitting unit, e.g. "43 s", "12.5 min" or "3.21 h"."""
    if hours < 1.5 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.1f} min" if hours < 1.5 else f"{hours:.2f} h"


def _print(rows: Sequence[tuple[str, Cost | str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 160)
    parts = ("steps", "validation", "previews", "scores", "checkpoints", "sum")
    table = Table(
        *("job", "parameters", "GFLOP an image", "s a step", "memory"),
        *parts,
        "disk",
        title="cost of training on this machine",
    )
    for name, cost in rows:
        if isinstance(cost, str):
            table.add_row(escape(name), f"[red]{escape(cost)}")
        else:
            table.add_row(
                escape(name),
                f"{cost.parameters / 1e6:.2f}M",
                f"{cost.flops / 1e9:.3g}",
                f"{cost.step:.3g}",
                f"{cost.memory / 2**30:.2f} GB",
                *map(
                    span,
                    (
                        *(cost.steps, cost.validations, cost.previews, cost.scores),
                        *(cost.checkpoints, cost.hours),
                    ),
                ),
                f"{cost.disk / 2**20:,.0f} MB",
            )
    possible = [cost for _, cost in rows if isinstance(cost, Cost)]
    if len(rows) > 1:
        disk = sum(cost.disk for cost in possible) / 2**20
        table.add_row(
            "all, one after the other", *[""] * 9, span(sum(c.hours for c in possible)), f"{disk:,.0f} MB"
        )
    console.print(table)

"""Loads a trained run: run folder or checkpoint -> denoiser, ready to be sampled and scored."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from src.app.assemble import (
    denoiser_of,
    fidelity_of,
    generation_of,
    recipe,
    set_reference,
    source_of,
)
from src.app.build import build, check_scalars
from src.diffusion.denoiser import Denoiser
from src.diffusion.variance import Variance
from src.errors import UserError
from src.evaluation.record import Protocol, Recipe
from src.generation.recipe import Generation, describe, warn_of_amplified_errors
from src.metrics.fidelity import FidelityScore
from src.runs.folder import FoundRun, find_run
from src.runs.machine import keep_freed_memory
from src.training import post_hoc
from src.training.checkpoint import read_checkpoint
from src.training.ema import EMA

log = logging.getLogger(__name__)

LOADING_SCALARS = {
    "run": str,
    "checkpoint": Literal["last", "best"],
    "weights": Literal["ema", "raw"] | PositiveFloat,
    "n": PositiveInt,
    "seed": NonNegativeInt,
    "batch_size": PositiveInt,
    "device": str,
}


@dataclass(frozen=True)
class LoadedRun:
    """A trained denoiser in eval mode, how it is to be sampled, and where it is from.

    Attributes:
        denoiser: with the weights that were asked for, on its device.
        generation: the recipe for images.
        config: the run's configuration, with the sampling choices of the one who loads it.
        found: its folder and checkpoint.
        step: training step of the checkpoint.
        weights: what they are, in the words of a protocol: "ema", "raw", "ema std=0.1".
        ema_decay: of the average, where it has one.
    """

    denoiser: Denoiser
    generation: Generation
    config: DictConfig
    found: FoundRun
    step: int
    weights: str
    ema_decay: float | None

    def recipe(self) -> dict[str, Any]:
        """How its images are made, as primitives."""
        return asdict(self._recipe())

    def protocol(self, score: FidelityScore) -> dict[str, Any]:
        """All that the last score depends on, as primitives."""
        return Protocol.of(score, self._recipe()).as_dict()

    def _recipe(self) -> Recipe:
        return recipe(self.generation, self.denoiser.variance, self.step, self.weights, self.ema_decay)


# What a door that loads a run may choose anew; None, and for the sampler's room an empty node, keep the run's own.
CHOICES = ("sampler", "spacing", "clipping", "variance", "metrics")


def load_with(config: DictConfig) -> LoadedRun:
    """The run that conf/sample.yaml or conf/evaluate.yaml asks for, with its choices.

    Raises:
        UserError: no such run, or an impossible choice.
    """
    check_scalars(config, LOADING_SCALARS)
    choices = {name: config[name] for name in CHOICES if config.get(name) is not None}
    return load(config.run, config.checkpoint, config.weights, config.device, config.seed, choices)


def load(
    run: str,
    checkpoint: str = "last",
    weights: str | float = "ema",
    device: str = "auto",
    seed: int = 0,
    choices: Mapping[str, DictConfig] | None = None,
) -> LoadedRun:
    """The denoiser of a run.

    Args:
        run: run folder or checkpoint file; the file alone is enough.
        checkpoint: "last" or "best", of a run folder.
        weights: "ema" (falls back to raw weights, saying so, if the run kept no average), "raw", or the length of
            a power-function average, to be made from the run's snapshots.
        device: "auto", or a torch device.
        seed: of the sampling noise.
        choices: configuration groups that replace the run's own, e.g. "sampler".

    Raises:
        UserError: no such run, a file that is not one of our checkpoints, or an impossible choice.
    """
    found = find_run(run, checkpoint)
    content = read_checkpoint(found.checkpoint)
    config = OmegaConf.create(content["config"])
    own_variance = build(config.variance, Variance, "variance")
    for name, node in (choices or {}).items():
        config[name] = node
    variance = build(config.variance, Variance, "variance")
    if variance.outputs > 1 and type(variance) is not type(own_variance):
        raise UserError(
            f"variance: {describe(variance)} is told by a network that was trained with it, and this run's was trained"
            f" with {describe(own_variance)}; choose variance=small or large"
        )
    denoiser = denoiser_of(config)
    generation = generation_of(config, seed, denoiser)
    warn_of_amplified_errors(denoiser, generation)
    averages, name, decay = averages_of(content, config, found, weights)
    prefix = "loss.denoiser.network."
    state = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
    try:
        denoiser.network.load_state_dict(state | averages)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UserError(f"{found.checkpoint} does not fit its own configuration: {first}") from None
    on = pick_device(device)
    if on.type == "cpu":
        keep_freed_memory()
    denoiser.eval().requires_grad_(False).to(on)
    return LoadedRun(denoiser, generation, config, found, content["global_step"], name, decay)


def averages_of(
    content: dict[str, Any], config: DictConfig, found: FoundRun, weights: str | float
) -> tuple[dict[str, torch.Tensor], str, float | None]:
    """The averaged weights that are asked for, what they are called, and their decay; empty for raw weights."""
    if weights == "raw":
        return {}, "raw", None
    if not isinstance(weights, str):
        made = post_hoc.synthesise(found.folder / post_hoc.FOLDER, weights, content["global_step"])
        return made, f"ema std={weights:g}, made from snapshots", None
    stored = next((s["weights"] for name, s in content["callbacks"].items() if name.startswith("EMA")), None)
    if stored is None:
        log.warning("%s has no averaged weights: the raw ones are used", found.checkpoint)
        return {}, "raw", None
    ema = build(config.ema, EMA, "ema")
    return stored, ema.name, ema.decay


def score_of(loaded: LoadedRun, cache: str) -> FidelityScore:
    """The score of a loaded run, on its device, with its reference set.

    Raises:
        UserError: the run has no score and none was chosen, or the data are not to be found.
    """
    source = source_of(loaded.config)
    score = fidelity_of(loaded.config)
    if score is None:
        raise UserError("metrics: this run has none; choose one, e.g. metrics=fid")
    score = score.to(next(loaded.denoiser.parameters()).device)
    if score.needs_reference:
        source.prepare()
        set_reference(score, 0, 1, source, cache)
    return score


def pick_device(device: str) -> torch.device:
    """A torch device; "auto" takes an accelerator if there is one."""
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except Exception as error:
        raise UserError(f"device={device}: {str(error).splitlines()[0]}; choose auto or cpu") from None

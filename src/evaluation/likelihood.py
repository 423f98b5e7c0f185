"""Bits per dimension of a trained run: what `metrics=nll` and `metrics=nll_flow` ask the evaluate door for."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from torch import Tensor

from src.app.assemble import source_of
from src.app.build import build
from src.app.load import LoadedRun
from src.data.transforms import to_model_range
from src.diffusion.denoiser import BaseDenoiser
from src.diffusion.likelihood import Chain, bound_terms, flow_likelihood
from src.diffusion.sampler import NoiseSource, PerImageNoise
from src.diffusion.schedule import DiscreteSchedule
from src.errors import UserError
from src.generation.recipe import Generation, describe


class Likelihood(ABC):
    """A way of telling the likelihood of images.

    Args:
        split: the split of the data whose images are asked about.

    Attributes:
        depends_on: entries of the run's recipe that change the scores, besides those of the weights.
    """

    depends_on: tuple[str, ...] = ()

    def __init__(self, split: Literal["train", "test"] = "test"):
        self.split = split

    @abstractmethod
    def terms(
        self,
        denoiser: BaseDenoiser,
        generation: Generation,
        x0: Tensor,
        condition: Tensor | None,
        noise: NoiseSource,
    ) -> Iterator[Tensor]:
        """Yields summands of -log2 p(x0) per dimension, each (B,)."""

    @abstractmethod
    def scores(self, summands: Tensor) -> dict[str, float]:
        """The scores by name, of the summands (number of them, images)."""


class BoundBits(Likelihood):
    """The variational bound over all steps of the schedule (Ho et al. 2020, eq. 5), x0 clipped as in sampling.

    Scores: `bits_per_dim`, and of it `bits_per_dim_decoder` and `bits_per_dim_prior`.
    """

    depends_on = ("variance", "clipping")

    def terms(self, denoiser, generation, x0, condition, noise):
        if not isinstance(denoiser.schedule, DiscreteSchedule):
            raise ValueError(
                f"schedule must be discrete for metrics=nll, {type(denoiser.schedule).__name__} has no steps: choose"
                " metrics=nll_flow"
            )
        chain = Chain(denoiser.schedule)
        yield chain.prior(x0)
        clipped = generation.clipping(denoiser) if generation.clipping else denoiser
        yield from bound_terms(clipped, chain, x0, condition, noise)

    def scores(self, summands):
        means = summands.mean(dim=1)
        return {
            "bits_per_dim": means.sum().item(),
            "bits_per_dim_decoder": means[1].item(),
            "bits_per_dim_prior": means[0].item(),
        }


class FlowBits(Likelihood):
    """The density along the probability-flow ODE, bytes spread over their bins (Song et al. 2021, sec. 4.3).

    Scores: `bits_per_dim_flow`. Unclipped; one dequantisation and one probe an image.

    Args:
        tolerance: relative and absolute, of each step of the integration; 1e-5 in the paper.
        split: whose images are asked about.

    Raises:
        ValueError: tolerance is not positive.
    """

    def __init__(self, tolerance: float = 1e-5, split: Literal["train", "test"] = "test"):
        super().__init__(split)
        if tolerance <= 0:
            raise ValueError(f"tolerance must be positive, got {tolerance}")
        self.tolerance = tolerance

    def terms(self, denoiser, generation, x0, condition, noise):
        yield flow_likelihood(denoiser, x0, condition, noise, self.tolerance).bits

    def scores(self, summands):
        return {"bits_per_dim_flow": summands.sum(dim=0).mean().item()}


def likelihood_of(config: DictConfig) -> Likelihood | None:
    """The likelihood that `metrics` names; None if it names a score of generated images, or nothing."""
    target = config.metrics and str(config.metrics.get("_target_"))
    return (
        build(config.metrics, Likelihood, "metrics") if target and target.startswith(f"{__name__}.") else None
    )


def evaluate(
    loaded: LoadedRun, likelihood: Likelihood, n: int, batch_size: int, seed: int
) -> dict[str, dict[str, Any]]:
    """The bits per dimension of the first n images of the split, with a progress bar.

    Raises:
        UserError: the likelihood is not defined for this denoiser.

    Returns:
        "scores", "protocol" (all that they depend on) and "curve" (the mean of each summand, in the order of
        `Likelihood.terms`), as primitives.
    """
    from rich.progress import Progress

    source = source_of(loaded.config)
    source.prepare()
    images = source.split(likelihood.split)
    n = min(n, len(images))
    device = next(loaded.denoiser.parameters()).device
    blocks = []
    with Progress(transient=True) as progress:
        done = progress.add_task(f"bits of {n} images", total=n)
        for start in range(0, n, batch_size):
            chosen = range(start, min(start + batch_size, n))
            x0 = to_model_range(images.images(chosen).to(device))
            labels = images.labels[chosen].to(device) if loaded.config.class_conditional else None
            noise = PerImageNoise(seed, chosen)
            terms = likelihood.terms(loaded.denoiser, loaded.generation, x0, labels, noise)
            try:
                blocks.append(torch.stack([term.double().cpu() for term in terms]))
            except ValueError as error:
                raise UserError(f"metrics: {error}") from None
            progress.advance(done, len(chosen))
    summands = torch.cat(blocks, dim=1)
    recipe = loaded.recipe()
    protocol = {
        "likelihood": describe(likelihood),
        "data": source.name,
        "split": likelihood.split,
        "fingerprint": source.fingerprint(likelihood.split),
        "num_images": n,
        "seed": seed,
        **{name: recipe[name] for name in ("training_steps", "weights", "ema_decay", *likelihood.depends_on)},
    }
    return {
        "scores": likelihood.scores(summands),
        "protocol": protocol,
        "curve": {"bits_per_dim": summands.mean(dim=1).tolist()},
    }


def folder(parent: Path, protocol: dict[str, Any]) -> Path:
    """A folder of its own for each protocol."""
    digest = sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:8]
    return parent / f"nll_seed-{protocol['seed']}_{digest}"

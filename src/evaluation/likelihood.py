"""Bits per dimension of images under a trained model: `metrics=nll` and `metrics=nll_flow` of `src.evaluate`."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from src.conditioning import Condition
from src.diffusion.denoiser import BaseDenoiser
from src.diffusion.likelihood import Chain, bound_terms, flow_likelihood
from src.diffusion.sampler import NoiseSource, PerImageNoise
from src.diffusion.schedule import DiscreteSchedule
from src.errors import UserError
from src.evaluation.record import Record
from src.generation.loaded import LoadedRun
from src.generation.recipe import CLIPPING, describe, kind_of
from src.metrics.uncertainty import by_influences


class Likelihood(ABC):
    """A method to compute the likelihood of images.

    Args:
        split: the split of the data whose images are evaluated.

    Attributes:
        depends_on: entries of the recipe's record on which the scores depend, besides those of the weights.
        clipped: whether the denoiser is used with the recipe's wrappers, e.g. clipping.
    """

    depends_on: tuple[str, ...] = ()
    clipped: bool = False

    def __init__(self, split: Literal["train", "test"] = "test"):
        self.split = split

    @abstractmethod
    def terms(
        self, denoiser: BaseDenoiser, x0: Tensor, condition: Condition | None, noise: NoiseSource
    ) -> Iterator[Tensor]:
        """Yields the summands of -log2 p(x0) per dimension, each (B,), for images x0 (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: the likelihood is not defined for this denoiser.
        """

    @abstractmethod
    def values(self, summands: Tensor) -> dict[str, Tensor]:
        """What each image adds to the scores, which are means: (number of images,) by name of the score.

        Args:
            summands: (number of terms, number of images).
        """


class BoundBits(Likelihood):
    """The variational bound over all steps of the schedule (Ho et al. 2020, eq. 5), x0 clipped as in sampling.

    Scores: `bits_per_dim`, and its parts `bits_per_dim_decoder` and `bits_per_dim_prior`.
    """

    depends_on = ("variance", "clipping")
    clipped = True

    def terms(self, denoiser, x0, condition, noise):
        if not isinstance(denoiser.schedule, DiscreteSchedule):
            raise ValueError(
                f"schedule must be discrete for metrics=nll, {type(denoiser.schedule).__name__} has no steps: choose"
                " metrics=nll_flow"
            )
        chain = Chain(denoiser.schedule)
        yield chain.prior(x0)
        yield from bound_terms(denoiser, chain, x0, condition, noise)

    def values(self, summands):
        return {
            "bits_per_dim": summands.sum(dim=0),
            "bits_per_dim_decoder": summands[1],
            "bits_per_dim_prior": summands[0],
        }


class FlowBits(Likelihood):
    """The density along the probability-flow ODE, with uniform dequantisation (Song et al. 2021, sec. 4.3).

    Score: `bits_per_dim_flow`. x0 is not clipped; one dequantisation and one probe per image.

    Args:
        tolerance: relative and absolute tolerance of each integration step; 1e-5 in the paper.
        split: the split of the data whose images are evaluated.

    Raises:
        ValueError: tolerance is not positive.
    """

    def __init__(self, tolerance: float = 1e-5, split: Literal["train", "test"] = "test"):
        super().__init__(split)
        if tolerance <= 0:
            raise ValueError(f"tolerance must be positive, got {tolerance}")
        self.tolerance = tolerance

    def terms(self, denoiser, x0, condition, noise):
        yield flow_likelihood(denoiser, x0, condition, noise, self.tolerance).bits

    def values(self, summands):
        return {"bits_per_dim_flow": summands.sum(dim=0)}


def score_likelihood(loaded: LoadedRun, likelihood: Likelihood, n: int, batch_size: int, seed: int) -> Record:
    """Computes the bits per dimension of the first n images of the split, with a progress bar.

    The intervals are over redraws of these images and of the noise; one image has none. The record's curve holds the
    mean of each term, in the order of `Likelihood.terms`.

    Args:
        loaded: the trained run.
        likelihood: the method.
        n: number of images, limited to the size of the split.
        batch_size: images per network call.
        seed: seed of the noise.

    Raises:
        UserError: the likelihood is not defined for this denoiser.
    """
    loaded.source.prepare()
    n = min(n, len(loaded.source.split(likelihood.split)))
    if any(kind_of(wrapper) not in CLIPPING for wrapper in loaded.recipe.wrappers):
        raise UserError(
            "metrics: a likelihood is of the network's own prediction; choose guidance=none and no wrappers"
        )
    denoiser = loaded.recipe.around(loaded.denoiser) if likelihood.clipped else loaded.denoiser
    blocks = []
    with tqdm(desc="bits per dimension", total=n, unit="image", delay=2, leave=False) as progress:
        for start in range(0, n, batch_size):
            chosen = range(start, min(start + batch_size, n))
            x0, condition = loaded.data(likelihood.split, chosen)
            terms = likelihood.terms(denoiser, x0, condition, PerImageNoise(seed, chosen))
            try:
                blocks.append(torch.stack([term.double().cpu() for term in terms]))
            except ValueError as error:
                raise UserError(f"metrics: {error}") from None
            progress.update(len(chosen))
    summands = torch.cat(blocks, dim=1)
    recipe = loaded.record(evaluations=0)
    used = ("training_steps", "weights", "ema_decay", *likelihood.depends_on)
    protocol = {
        "likelihood": describe(likelihood),
        "data": loaded.source.name,
        "split": likelihood.split,
        "fingerprint": loaded.source.fingerprint(likelihood.split),
        "num_images": n,
        "seed": seed,
        **{name: recipe[name] for name in used},
    }
    curve = {"bits_per_dim": summands.mean(dim=1).tolist()}
    values = likelihood.values(summands)
    scores = {name: value.mean().item() for name, value in values.items()}
    if n < 2:
        return Record(scores, protocol, curve)
    intervals = {name: list(by_influences(scores[name], value)) for name, value in values.items()}
    return Record(scores, protocol, curve, intervals)

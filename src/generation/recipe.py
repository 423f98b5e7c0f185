"""The recipe by which images are made: sampler, spacing, clipping and seed, as one object.

Previews, scores and the command line share it, so that what is previewed is what is scored.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from src.data.transforms import to_uint8
from src.diffusion.denoiser import BaseDenoiser, Denoiser
from src.diffusion.sampler import PerImageNoise, Sampler, State, last_image
from src.diffusion.schedule import Schedule
from src.diffusion.spacing import Spacing

log = logging.getLogger(__name__)

# Of c_out: 158 for DDPM's linear schedule and eps, which samples well unclipped, 20,000 for the cosine.
LARGEST_GAIN = 1000
# Of alpha/sigma where sampling starts: 0.016 for DDPM's linear schedule in 10 leading steps, Stable Diffusion's 0.07.
LARGEST_MISSING_SIGNAL = 0.1


@dataclass(frozen=True)
class Generation:
    """How noise becomes images.

    Image i is a function of (seed, i), its label and the recipe alone: batches and devices do not matter.

    Attributes:
        sampler: the method.
        spacing: which times it visits.
        steps: number of its steps.
        clipping: puts the clipping of x0 around a denoiser; None for none.
        image_shape: (C, H, W).
        num_classes: image i gets label i mod num_classes; 0 for images without labels.
        seed: the sampling seed.
    """

    sampler: Sampler
    spacing: Spacing
    steps: int
    clipping: Callable[[BaseDenoiser], BaseDenoiser] | None
    image_shape: tuple[int, int, int]
    num_classes: int
    seed: int
    _evaluations: set[int] = field(default_factory=set, init=False, repr=False, compare=False)

    def times(self, schedule: Schedule) -> Tensor:
        """The S + 1 falling times that are visited on this schedule."""
        return self.spacing(schedule, self.steps)

    def trajectory(self, denoiser: BaseDenoiser, indices: Sequence[int]) -> Iterator[State]:
        """The states of the images with these numbers, from noise to images in [-1, 1], (B, C, H, W)."""
        noise, x_T, labels = self.start(denoiser, indices)
        times = self.times(denoiser.schedule)
        return self.sampler.trajectory(self.around(denoiser), x_T, times, labels, noise)

    def counted(self, states: Iterator[State], before: int = 0) -> Iterator[State]:
        """The states; with the last, what they have cost is noted for `network_evaluations`.

        Args:
            states: of a sampler.
            before: evaluations on the way to the first of them, e.g. of an encoding.
        """
        for state in states:
            evaluations = before + state.evaluations
            yield state
            del state  # its memory can serve the next step
        self._evaluations.add(evaluations)

    def start(
        self, denoiser: BaseDenoiser, indices: Sequence[int]
    ) -> tuple[PerImageNoise, Tensor, Tensor | None]:
        """Where the images with these numbers begin: the source of their further noise, x_T and their labels."""
        device = next(denoiser.parameters()).device
        noise = PerImageNoise(self.seed, indices)
        x_T = noise(torch.empty(len(indices), *self.image_shape, device=device))
        x_T = x_T * denoiser.schedule(self.times(denoiser.schedule)[:1]).scalars()[0].sigma
        labels = None
        if self.num_classes:
            labels = torch.tensor([i % self.num_classes for i in indices], device=device)
        return noise, x_T, labels

    def around(self, denoiser: BaseDenoiser) -> BaseDenoiser:
        """The denoiser as it is sampled: clipped, if there is clipping."""
        return self.clipping(denoiser) if self.clipping else denoiser

    def images(self, denoiser: BaseDenoiser, indices: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        """The images with these numbers as bytes: uint8 batches of at most batch_size, shape (B, C, H, W)."""
        for start in range(0, len(indices), batch_size):
            states = self.trajectory(denoiser, indices[start : start + batch_size])
            yield to_uint8(last_image(self.counted(states)))

    @property
    def network_evaluations(self) -> int:
        """Evaluations of the denoiser for one image, as `counted` on the way; 0 before.

        An adaptive solver's number differs between batches: then the largest.
        """
        return max(self._evaluations, default=0)


def warn_of_amplified_errors(denoiser: Denoiser, generation: Generation) -> None:
    """Warns of a start of sampling where x0 is the network's error many times over, and nothing bounds it."""
    start = denoiser.schedule(generation.times(denoiser.schedule)[:1]).scalars()[0]
    _, _, c_out = denoiser.parameterization.coefficients(start)
    if generation.clipping is None and abs(c_out) > LARGEST_GAIN:
        log.warning(
            "clipping=none: the first step of sampling multiplies the network's errors by %s in x0; choose"
            " clipping=static, or parameterization=v",
            f"{abs(c_out):,.0f}",
        )


def warn_of_missing_signal(denoiser: Denoiser, generation: Generation) -> None:
    """Warns of sampling from noise alone at a time whose images the network knows as noise and some signal.

    See Lin et al. 2023, arXiv:2305.08891, section 3.3.
    """
    schedule = denoiser.schedule
    time = generation.times(schedule)[:1]
    start, noisiest = schedule([time.item(), schedule.t_max]).scalars()
    # of the schedule's own end, 0.01 for rounding, no spacing is to blame
    if start.alpha > LARGEST_MISSING_SIGNAL * start.sigma and start.log_snr > noisiest.log_snr + 0.01:
        log.warning(
            "spacing: sampling starts from noise alone at t = %g of %g, where this schedule still has signal (alpha"
            " %.2g, sigma %.2g); choose spacing=trailing",
            time.item(),
            schedule.t_max,
            start.alpha,
            start.sigma,
        )


def describe(part: object | None) -> str:
    """A part's class and numbers in one line for protocols, e.g. "DDIM(eta=0.0)"; "none" for None."""
    if part is None:
        return "none"
    kind, numbers = (part.func, part.keywords) if isinstance(part, partial) else (type(part), vars(part))
    return f"{kind.__name__}({', '.join(f'{name}={value!r}' for name, value in numbers.items())})"

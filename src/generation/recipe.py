"""The sampling recipe: sampler, spacing, wrappers, conditioning and seed.

Previews, scores and the command line use the same recipe, so that previews show the images that are scored.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src.conditioning import Condition, Conditioning
from src.data.codec import Codec
from src.diffusion.clipping import DynamicThresholding, StaticClipping
from src.diffusion.denoiser import BaseDenoiser, Denoiser, Wrapper, wrapped
from src.diffusion.sampler import PerImageNoise, Sampler, State
from src.diffusion.schedule import Schedule
from src.diffusion.spacing import Spacing
from src.diffusion.variance import Variance

log = logging.getLogger(__name__)

# Largest c_out without a warning. DDPM's linear schedule with eps has 158 and needs no clipping; cosine has 20,000.
LARGEST_GAIN = 1000
# Largest alpha/sigma at the start of sampling without a warning. DDPM's linear schedule in 10 leading steps has 0.016,
# Stable Diffusion has 0.07.
LARGEST_MISSING_SIGNAL = 0.1
CLIPPING = (StaticClipping, DynamicThresholding)
# Most conditions of a grid with a column for each.
WIDEST = 50


class Start(NamedTuple):
    """The initial state of a batch of a sampling run.

    Attributes:
        x_T: noise with the standard deviation of the first time, shape (B, C, H, W).
        condition: the condition of the images, or None.
        noise: source of the noise of the steps.
    """

    x_T: Tensor
    condition: Condition | None
    noise: PerImageNoise


class Generated(NamedTuple):
    """A batch of generated images.

    Attributes:
        images: uint8, shape (B, C, H, W).
        evaluations: network evaluations per image.
        labels: the classes on which they were conditioned, int64, shape (B,), on the CPU; None without classes.
    """

    images: Tensor
    evaluations: int
    labels: Tensor | None = None


@dataclass(frozen=True)
class Recipe:
    """How images are generated.

    Image i depends only on (seed, i), its condition and the recipe, not on batches or devices.

    Attributes:
        sampler: the sampler.
        spacing: the times it visits.
        steps: number of steps.
        wrappers: wrappers of the denoiser (guidance, clipping, ...), the innermost first.
        codec: decodes the generated images.
        conditioning: defines the condition of image i; None for unconditional sampling.
        seed: the sampling seed.
        device_noise: whether noise is drawn on the denoiser's device, where its numbers are others than the CPU's.
    """

    sampler: Sampler
    spacing: Spacing
    steps: int
    wrappers: tuple[Wrapper, ...]
    codec: Codec
    conditioning: Conditioning | None
    seed: int
    device_noise: bool = False

    def times(self, schedule: Schedule) -> Tensor:
        """The S + 1 decreasing times that are visited on this schedule."""
        return self.spacing(schedule, self.steps)

    def around(self, denoiser: BaseDenoiser, wrappers: Sequence[Wrapper] | None = None) -> BaseDenoiser:
        """The denoiser with wrappers, by default the recipe's; further networks of guidance are moved to its device."""
        around = wrapped(denoiser, self.wrappers if wrappers is None else wrappers)
        devices = [parameter.device for parameter in around.parameters()]
        first = next(denoiser.parameters(), None)
        if first is not None and any(device != first.device for device in devices):
            around.to(first.device)
        return around

    def condition(self, indices: Sequence[int]) -> Condition | None:
        """The condition of the images with these indices, on the CPU; None for unconditional sampling."""
        return None if self.conditioning is None else self.conditioning.of_samples(indices, self.seed)

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """The classes of the images with these indices, int64, on the CPU; None without classes."""
        condition = self.condition(indices)
        return None if condition is None else condition.labels

    def columns(self, n: int) -> int | None:
        """The columns of a grid of n images in which all images of a column have the same condition, if there are.

        About as many as the rows, and a multiple of the number of different conditions.
        """
        period = self.conditioning.period if self.conditioning else None
        if period is None or not 1 < period <= min(n, WIDEST):
            return None
        return period * max(1, round(math.sqrt(n) / period))

    def caption(self, n: int, class_names: Sequence[str]) -> str | None:
        """The classes in a grid of n images for people, e.g. "columns: cat, dog"; None without classes.

        Args:
            n: number of images.
            class_names: the names of the classes, by label.
        """
        columns = self.columns(n)
        labels = self.labels(range(columns or n))
        if labels is None:
            return None
        names = [class_names[label] for label in labels.tolist()]
        if len(set(names)) == 1:
            return f"class: {names[0]}"
        return f"{'columns' if columns else 'row by row'}: {', '.join(names)}"

    def start(
        self, denoiser: BaseDenoiser, indices: Sequence[int], condition: Condition | None = None
    ) -> Start:
        """The initial state of the images with these indices, on the denoiser's device.

        Args:
            denoiser: the denoiser.
            indices: their indices in the sampling run.
            condition: their condition, instead of that which `conditioning` gives these indices.
        """
        device = next(denoiser.parameters()).device
        noise = self.noise(indices, device)
        x_T = noise(torch.empty(len(indices), *self.codec.shape, device=device))
        x_T = x_T * denoiser.schedule(self.times(denoiser.schedule)[:1]).scalars()[0].sigma
        condition = self.condition(indices) if condition is None else condition
        return Start(x_T, None if condition is None else condition.to(device), noise)

    def noise(self, indices: Sequence[int], device: torch.device, purpose: str = "sample") -> PerImageNoise:
        """The noise of the images with these indices, for images on this device; see `PerImageNoise`."""
        return PerImageNoise(self.seed, indices, purpose, device if self.device_noise else "cpu")

    def texts(self, indices: Sequence[int]) -> list[str] | None:
        """The prompts of the images with these indices; None if they have none."""
        return None if self.conditioning is None else self.conditioning.texts(indices)

    def trajectory(self, denoiser: BaseDenoiser, indices: Sequence[int]) -> Iterator[State]:
        """The states of the images with these indices, from noise to x0, shape (B, *codec.shape)."""
        return self._from(self.start(denoiser, indices), denoiser)

    def _from(self, start: Start, denoiser: BaseDenoiser) -> Iterator[State]:
        times = self.times(denoiser.schedule)
        return self.sampler.trajectory(self.around(denoiser), start.x_T, times, start.condition, start.noise)

    def images(self, denoiser: BaseDenoiser, indices: Sequence[int], batch_size: int) -> Iterator[Generated]:
        """Generates the images with these indices, in batches of at most batch_size."""
        for first in range(0, len(indices), batch_size):
            chosen = indices[first : first + batch_size]
            condition = self.condition(chosen)
            start = self.start(denoiser, chosen, condition)
            states = self._from(start, denoiser)
            del start  # frees x_T after the first step
            for state in states:
                x, evaluations = state.x, state.evaluations
                del state  # frees its memory for the next step
            yield Generated(
                self.codec.decode(x), evaluations, None if condition is None else condition.labels
            )

    def record(self, variance: Variance, evaluations: int) -> dict[str, Any]:
        """The recipe as primitives, for records.

        Args:
            variance: the denoiser's variance of the reverse step.
            evaluations: network evaluations per image; the largest number if an adaptive solver's differ.
        """
        clipping = [describe(w) for w in self.wrappers if kind_of(w) in CLIPPING]
        others = [describe(w) for w in self.wrappers if kind_of(w) not in CLIPPING]
        return {
            "sampler": describe(self.sampler),
            "spacing": describe(self.spacing),
            "variance": describe(variance),
            "guidance": ", ".join(others) or "none",
            "clipping": ", ".join(clipping) or "none",
            "labels": self.conditioning.describe_samples() if self.conditioning else "none",
            "steps": self.steps,
            "network_evaluations": evaluations,
            "seed": self.seed,
        }

    @property
    def clips(self) -> bool:
        """Whether a wrapper clips the estimate of x0."""
        return any(kind_of(wrapper) in CLIPPING for wrapper in self.wrappers)


def warn_of_amplified_errors(denoiser: Denoiser, recipe: Recipe) -> None:
    """Warns if the first step multiplies the network's errors by a large factor in x0, without clipping."""
    start = denoiser.schedule(recipe.times(denoiser.schedule)[:1]).scalars()[0]
    _, _, c_out = denoiser.parameterization.coefficients(start)
    if not recipe.clips and abs(c_out) > LARGEST_GAIN:
        log.warning(
            "clipping=none: the first step of sampling multiplies the network's errors by %s in x0; choose"
            " clipping=static, or parameterization=v",
            f"{abs(c_out):,.0f}",
        )


def warn_of_missing_signal(denoiser: Denoiser, recipe: Recipe) -> None:
    """Warns if sampling starts from pure noise at a time where training images still have signal.

    See Lin et al. 2023, arXiv:2305.08891, section 3.3.
    """
    schedule = denoiser.schedule
    time = recipe.times(schedule)[:1]
    start, noisiest = schedule([time.item(), schedule.t_max]).scalars()
    # no warning if the spacing starts at the schedule's noisiest time; 0.01 for rounding
    if start.alpha > LARGEST_MISSING_SIGNAL * start.sigma and start.log_snr > noisiest.log_snr + 0.01:
        log.warning(
            "spacing: sampling starts from noise alone at t = %g of %g, where this schedule still has signal (alpha"
            " %.2g, sigma %.2g); choose spacing=trailing",
            time.item(),
            schedule.t_max,
            start.alpha,
            start.sigma,
        )


def kind_of(part: object) -> type:
    """The class of an object, of a class itself, or of a functools.partial."""
    return part.func if isinstance(part, partial) else part if isinstance(part, type) else type(part)


def describe(part: object | None) -> str:
    """An object's class and arguments in one line for records, e.g. "DDIM(eta=0.0)"; "none" for None."""
    if part is None:
        return "none"
    if isinstance(part, type):
        return f"{part.__name__}()"
    numbers = part.keywords if isinstance(part, partial) else vars(part)
    words = [f"{name}={_in_words(value)}" for name, value in numbers.items()]
    return f"{kind_of(part).__name__}({', '.join(words)})"


def _in_words(value: object) -> str:
    """An argument for records: a second run by its identity, a part by its description."""
    if isinstance(value, partial):
        return describe(value)
    return getattr(value, "identity", None) or repr(value)

"""The denoiser: a network with its schedule and parameterisation.

    denoiser(x_t, level, condition) -> Prediction(x0, eps)
    denoiser.reverse(x_t, t, s, condition) -> Gaussian, p(x_s | x_t)

Guidance and clipping are denoisers that wrap another denoiser (`WrappedDenoiser`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from src.conditioning import Condition

from .noise_level import NoiseLevel, broadcast, conditional_variance
from .parameterization import Parameterization, Prediction
from .schedule import Schedule
from .variance import Small, Variance


@dataclass(frozen=True)
class Gaussian:
    """A diagonal Gaussian over images.

    Attributes:
        mean: shape (B, C, H, W).
        variance: a float, or a tensor that broadcasts against the mean.
        prediction: the prediction it was computed from, if any.
    """

    mean: Tensor
    variance: Tensor | float
    prediction: Prediction | None = None


def posterior_mean(x0: Tensor, x_t: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """Mean of q(x_s | x_t, x0) for s < t (Ho et al. 2020, eq. 7, for any pair of times and any alpha, sigma).

    mean = alpha_s sigma_{t|s}^2 / sigma_t^2 x0 + (alpha_t/alpha_s) sigma_s^2 / sigma_t^2 x_t
    """
    of_x0 = s.alpha * conditional_variance(t, s) / t.sigma**2
    of_x_t = t.alpha / s.alpha * s.sigma**2 / t.sigma**2
    return broadcast(of_x0, x_t) * x0 + broadcast(of_x_t, x_t) * x_t


class BaseDenoiser(nn.Module, ABC):
    """Predicts x0 and eps from x_t: the interface used by samplers, losses and likelihoods.

    Attributes:
        schedule: the noise schedule, which maps times to levels.
        variance: the variance of p(x_s | x_t).
        evaluated_images: number of images passed through the network so far, including guidance's second pass.
        identity: a description for records, of a denoiser that is an argument of another one.
        second_time: whether it predicts steps from t to s, with s given as `to`.
        makes_images: whether samplers make images of it; a classifier and an autoencoder only train as denoisers do.
    """

    schedule: Schedule
    variance: Variance
    identity: str | None = None
    second_time: bool = False
    makes_images: bool = True

    def __init__(self) -> None:
        super().__init__()
        self.evaluated_images = 0

    def __call__(
        self,
        x_t: Tensor,
        level: NoiseLevel,
        condition: Condition | None = None,
        to: NoiseLevel | None = None,
    ) -> Prediction:
        """See `forward`. An implementation that uses no second time may omit the argument `to`."""
        self._count(x_t)
        second = () if to is None else (to,)
        return super().__call__(x_t, level, condition, *second)

    def _count(self, x_t: Tensor) -> None:
        self.evaluated_images += len(x_t)

    @abstractmethod
    def forward(
        self,
        x_t: Tensor,
        level: NoiseLevel,
        condition: Condition | None = None,
        to: NoiseLevel | None = None,
    ) -> Prediction:
        """The estimates of x0 and eps.

        Args:
            x_t: noisy images, shape (B, C, H, W).
            level: one level of floats for all images, or levels of shape (B,); sigma > 0.
            condition: the condition of the images, or None.
            to: the level of a second time, for networks that predict a step from `level` to `to`.
        """

    def reset(self) -> None:
        """Clears the state that a wrapper keeps along a trajectory; samplers call it before the first step."""

    def reverse(
        self, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, condition: Condition | None = None
    ) -> Gaussian:
        """p(x_s | x_t) = q(x_s | x_t, x0_hat) with the chosen variance (Ho et al. 2020, eq. 1 and 7)."""
        prediction = self(x_t, t, condition)
        mean = posterior_mean(prediction.x0, x_t, t, s)
        return Gaussian(mean, broadcast(self.variance(t, s, prediction), x_t), prediction)


class Denoiser(BaseDenoiser):
    """A denoiser backed by a network.

    Args:
        network: maps (c_in x_t, label of shape (B,), condition) to an output of x_t's shape, or with twice the
            channels if the network was trained with a learned variance.
        schedule: the noise schedule the network is trained on.
        parameterization: how the network's output determines x0 and eps.
        variance: the reverse step's variance (default: `Small`).

    Attributes:
        autocast: dtype to which the network's operations are cast, as by torch.autocast; None for none. The arithmetic
            around the network is not affected.

    Raises:
        ValueError: the arguments are incompatible; the message names the option to change.
    """

    autocast: torch.dtype | None = None
    _latest: tuple[NoiseLevel, Any] | None = None

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        parameterization: Parameterization,
        variance: Variance | None = None,
    ):
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.parameterization = parameterization
        self.variance = variance or Small()
        parameterization.check(schedule)
        self.variance.check(schedule)
        # plain modules may not declare their shapes
        shape, out_channels = getattr(network, "image_shape", None), getattr(network, "out_channels", None)
        if shape is not None and out_channels is not None and out_channels < shape[0] * self.variance.outputs:
            needed = shape[0] * self.variance.outputs
            raise ValueError(
                f"model.out_channels={out_channels}: omit it, or give +model.out_channels={needed}; with images of"
                f" {shape[0]} channels and this variance ({type(self.variance).__name__}) the network needs {needed}"
                " output channels"
            )

    @property
    def second_time(self) -> bool:
        return getattr(self.network, "second_time", False)

    def coefficients(self, level: NoiseLevel) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """c_in, c_skip and c_out of the parameterisation; those of the latest level are kept."""
        if self._latest is None or self._latest[0] is not level:
            self._latest = level, self.parameterization.coefficients(level)
        return self._latest[1]

    def evaluate(
        self,
        x_t: Tensor,
        level: NoiseLevel,
        condition: Condition | None = None,
        to: NoiseLevel | None = None,
    ) -> Tensor:
        """The network's whole output at (c_in x_t, label), in x_t's dtype."""
        c_in, _, _ = self.coefficients(level)
        if not (isinstance(c_in, float) and math.isclose(c_in, 1)):  # saves a pass over x_t
            x_t = broadcast(c_in, x_t) * x_t
        label = self._label(level, x_t)
        second = {} if to is None else {"to_label": self._label(to, x_t)}
        weight = next(self.network.parameters(), x_t)
        # float32 images pass through a network of bfloat16 weights, and the sampler's arithmetic stays in float32
        network_input = x_t.to(weight.dtype) if weight.is_floating_point() else x_t
        cast = nullcontext() if self.autocast is None else torch.autocast(x_t.device.type, self.autocast)
        with cast:
            output = self.network(network_input, label, condition, **second)
        return output.to(x_t.dtype)

    def output(
        self,
        x_t: Tensor,
        level: NoiseLevel,
        condition: Condition | None = None,
        to: NoiseLevel | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """F(c_in x_t, label) and the variance output (or None), both with x_t's shape and dtype."""
        output = self.evaluate(x_t, level, condition, to)
        channels = x_t.shape[1]
        if output.shape[1] not in (channels, 2 * channels):
            raise ValueError(
                f"network: its output has {output.shape[1]} channels for images of {channels}; it needs {channels}, or"
                f" {2 * channels} with a learned variance"
            )
        if output.shape[1] == channels:
            return output, None
        return output[:, :channels], output[:, channels:]

    def _label(self, level: NoiseLevel, x_t: Tensor) -> Tensor:
        """The network's label, shape (B,), at least float32: bfloat16 would round 999 to 1000."""
        label = self.parameterization.label(level)
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        if isinstance(label, float):
            return torch.full((x_t.shape[0],), label, dtype=dtype, device=x_t.device)
        return label.to(x_t.device, dtype, non_blocking=True)

    def forward(self, x_t, level, condition=None, to=None):
        output, variance = self.output(x_t, level, condition, to)
        if variance is None and self.variance.outputs > 1:
            raise ValueError(
                f"variance: {type(self.variance).__name__} is predicted by the network, whose output has no channels"
                f" for it: set out_channels={x_t.shape[1] * self.variance.outputs}, or choose Small() or Large()"
            )
        prediction = self.parameterization.predict(x_t, output, level)
        return prediction if variance is None else prediction.with_variance(variance)


class WrappedDenoiser(BaseDenoiser):
    """Wraps a denoiser and modifies its predictions; schedule and variance are those of the inner denoiser.

    Subclasses implement `forward`. Evaluations are counted at the network, so a wrapper that calls the inner denoiser
    twice counts as two evaluations.

    Args:
        inner: the wrapped denoiser.
    """

    def __init__(self, inner: BaseDenoiser):
        nn.Module.__init__(self)
        self.inner = inner

    def _count(self, x_t: Tensor) -> None:
        pass  # the inner denoiser counts

    def reset(self) -> None:
        self.inner.reset()

    @property
    def schedule(self) -> Schedule:
        return self.inner.schedule

    @property
    def variance(self) -> Variance:
        return self.inner.variance

    @property
    def second_time(self) -> bool:
        return self.inner.second_time

    @property
    def evaluated_images(self) -> int:
        return self.inner.evaluated_images


Wrapper = Callable[[BaseDenoiser], BaseDenoiser]


def wrapped(denoiser: BaseDenoiser, wrappers: Iterable[Wrapper]) -> BaseDenoiser:
    """Applies wrappers to a denoiser; the first is the innermost."""
    for wrap in wrappers:
        denoiser = wrap(denoiser)
    return denoiser


class Conditioned(WrappedDenoiser):
    """A denoiser with a fixed condition, so that samplers do not pass it.

    Args:
        inner: the wrapped denoiser.
        condition: the condition of the B images, passed at each call; or None.
    """

    def __init__(self, inner: BaseDenoiser, condition: Condition | None):
        super().__init__(inner)
        self.condition = condition

    def forward(self, x_t, level, condition=None, to=None):
        return self.inner(x_t, level, self.condition, to)

    def reverse(self, x_t, t, s, condition=None):
        return self.inner.reverse(x_t, t, s, self.condition)

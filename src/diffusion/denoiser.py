"""The denoiser: a network, its schedule and the meaning of its output, asked about a noisy image.

    denoiser(x_t, level, condition) -> Prediction(x0, eps)
    denoiser.reverse(x_t, t, s, condition) -> Gaussian, p(x_s | x_t)

Guidance, clipping and the like are denoisers around denoisers (`WrappedDenoiser`).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
        prediction: the prediction from which it was made, where there is one.
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
    """Anything that can be asked for a prediction: what samplers, losses and likelihoods are written for.

    Attributes:
        schedule: which level a time has.
        variance: how p(x_s | x_t) gets its variance.
    """

    schedule: Schedule
    variance: Variance

    @abstractmethod
    def forward(self, x_t: Tensor, level: NoiseLevel, condition: Tensor | None = None) -> Prediction:
        """The estimates of x0 and eps.

        Args:
            x_t: noisy images, shape (B, C, H, W).
            level: one level of floats for all images, or levels of shape (B,); sigma > 0.
            condition: what the network is conditioned on, e.g. class labels of shape (B,); None for nothing.
        """

    def reverse(self, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, condition: Tensor | None = None) -> Gaussian:
        """p(x_s | x_t) = q(x_s | x_t, x0_hat) with the chosen variance (Ho et al. 2020, eq. 1 and 7)."""
        prediction = self(x_t, t, condition)
        mean = posterior_mean(prediction.x0, x_t, t, s)
        return Gaussian(mean, broadcast(self.variance(t, s, prediction), x_t), prediction)


class Denoiser(BaseDenoiser):
    """A network as a denoiser.

    Args:
        network: maps (c_in x_t, label of shape (B,), condition) to an output of x_t's shape; of twice the
            channels where the variance is learned, or was in training.
        schedule: the noise schedule that it is trained on.
        parameterization: what its output means.
        variance: the reverse step's variance (default: `Small`).

    Raises:
        ValueError: the parts do not fit together; names the option to change.
    """

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
        # networks from elsewhere need not say how many channels they have
        channels, out_channels = getattr(network, "channels", None), getattr(network, "out_channels", None)
        if None not in (channels, out_channels) and out_channels < (
            needed := channels * self.variance.outputs
        ):
            raise ValueError(
                f"model.out_channels={out_channels}: leave it out, or say +model.out_channels={needed}; with images of"
                f" {channels} channels and this variance ({type(self.variance).__name__}) the network's output needs"
                f" {needed}"
            )

    def output(
        self, x_t: Tensor, level: NoiseLevel, condition: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """F(c_in x_t, label) and what the network says about the variance (or None), both of x_t's shape and dtype."""
        c_in, _, _ = self.parameterization.coefficients(level)
        if not (isinstance(c_in, float) and math.isclose(c_in, 1)):  # no pass over x_t without need
            x_t = broadcast(c_in, x_t) * x_t
        label = self.parameterization.label(level)
        if isinstance(label, float):
            label = torch.full((x_t.shape[0],), label, dtype=x_t.dtype, device=x_t.device)
        else:
            label = label.to(x_t.device, x_t.dtype, non_blocking=True)
        output = self.network(x_t, label, condition).to(x_t.dtype)
        channels = x_t.shape[1]
        if output.shape[1] <= channels:
            return output, None
        return output[:, :channels], output[:, channels:]

    def forward(self, x_t: Tensor, level: NoiseLevel, condition: Tensor | None = None) -> Prediction:
        output, variance = self.output(x_t, level, condition)
        if variance is None and self.variance.outputs > 1:
            raise ValueError(
                f"variance: {type(self.variance).__name__} is told by the network, whose output has no channels for it:"
                f" give it {x_t.shape[1] * self.variance.outputs}, or choose Small() or Large()"
            )
        prediction = self.parameterization.predict(x_t, output, level)
        return prediction if variance is None else prediction.with_variance(variance)


class WrappedDenoiser(BaseDenoiser):
    """A denoiser around a denoiser: changes what it predicts, and leaves schedule and variance as they are.

    Args:
        inner: the denoiser that is asked.
    """

    def __init__(self, inner: BaseDenoiser):
        super().__init__()
        self.inner = inner
        self.schedule = inner.schedule
        self.variance = inner.variance


class Conditioned(WrappedDenoiser):
    """A denoiser with its condition filled in, so that a sampler need not carry it.

    Args:
        inner: the denoiser that is asked.
        condition: given to it at each call, shape (B, ...).
    """

    def __init__(self, inner: BaseDenoiser, condition: Tensor | None):
        super().__init__(inner)
        self.condition = condition

    def forward(self, x_t, level, condition=None):
        return self.inner(x_t, level, self.condition)

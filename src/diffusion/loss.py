"""The training losses.

    denoising:  weight(level_t) c_out^2 mean_pixels distance(F(x_t), target),    x_t = alpha_t x0 + sigma_t eps
    vlb:        T times the step's term of the variational bound
    hybrid:     denoising + vlb_weight vlb, where the bound trains the variance only

For eps-prediction with `Simple` weighting and squared distance the first is L_simple of DDPM (Ho et al. 2020,
eq. 14).
"""

import torch
from torch import Tensor, nn

from .denoiser import Denoiser
from .distance import Distance, Squared
from .forward import diffuse
from .likelihood import Chain
from .noise_level import NoiseLevel
from .time_sampling import AdaptiveTimeSampling, TimeSampling
from .weighting import LearnedUncertainty, Simple, Weighting


class DenoisingLoss(nn.Module):
    """The weighted error of the network's output.

    Args:
        denoiser: whose network is trained.
        weighting: weight on the error of x0, by noise level.
        time_sampling: which times the trainer draws.
        distance: between output and target (default: `Squared`).

    Raises:
        ValueError: the denoiser's variance is learned, which this loss does not train, or a time sampling that
            learns from the losses is given losses that are balanced.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weighting: Weighting,
        time_sampling: TimeSampling,
        distance: Distance | None = None,
    ):
        super().__init__()
        self.denoiser = denoiser
        self.weighting = weighting
        self.time_sampling = time_sampling
        self.distance = distance or Squared()
        self.check()
        if isinstance(weighting, LearnedUncertainty) and isinstance(time_sampling, AdaptiveTimeSampling):
            raise ValueError(
                "time_sampling=importance prefers the times of large losses, which weighting=learned_uncertainty makes"
                " alike: choose time_sampling=uniform, or weighting=edm"
            )

    def check(self) -> None:
        """Refuses parts that do not belong together."""
        if self.denoiser.variance.outputs > 1:
            raise ValueError(
                "denoiser has a learned variance, which loss=denoising does not train: choose loss=hybrid or vlb,"
                " or variance=small"
            )

    def forward(self, x0: Tensor, t: Tensor, eps: Tensor, condition: Tensor | None = None) -> Tensor:
        """The loss of each image at a given time and noise.

        Args:
            x0: images in [-1, 1], shape (B, C, H, W).
            t: times, shape (B,), float64, on the CPU; of a table's rows, where the loss needs steps.
            eps: standard normal noise, x0's shape.
            condition: class labels, shape (B,), or None.

        Returns:
            Shape (B,), x0's dtype: mean over pixels, weighted.
        """
        level = self.denoiser.schedule(t)
        x_t = diffuse(x0, eps, level)
        output, _ = self.denoiser.output(x_t, level, condition)
        return self.weighted_error(output, x0, eps, level)

    def weighted_error(self, output: Tensor, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
        """The weighted distance of the network's output F from its target, shape (B,)."""
        parameterization = self.denoiser.parameterization
        target = parameterization.target(x0, eps, level)
        error = self.distance(output, target).flatten(1).mean(dim=1)
        c_out = torch.as_tensor(parameterization.coefficients(level)[2], dtype=torch.float64)
        weight = self.weighting(level, c_out) * c_out**2
        return self.weighting.balance(weight.to(error.device, error.dtype, non_blocking=True) * error, level)


class VariationalLoss(DenoisingLoss):
    """T L_{t-1} in bits per dimension: with uniform times the variational bound, up to its constant prior term.

    L_vlb of improved DDPM (Nichol & Dhariwal 2021, sec. 3.1), best with importance-sampled times. It trains the
    variance too, where that is learned.

    Args:
        denoiser: whose network is trained.
        weighting: must be `Simple`, for the bound has weights of its own.
        time_sampling: which times the trainer draws.
        distance: must be `Squared`.

    Raises:
        ValueError: the schedule has no steps, or another weighting or distance is asked for.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weighting: Weighting,
        time_sampling: TimeSampling,
        distance: Distance | None = None,
    ):
        super().__init__(denoiser, weighting, time_sampling, distance)
        self.chain = Chain(denoiser.schedule)

    def check(self):
        if not isinstance(self.weighting, Simple):
            raise ValueError(
                "weighting has no effect on loss=vlb, which has its own: choose weighting=simple"
            )
        if not isinstance(self.distance, Squared):
            raise ValueError("distance has no effect on loss=vlb, which has its own: choose distance=squared")

    def forward(self, x0, t, eps, condition=None):
        level = self.denoiser.schedule(t)
        prediction = self.denoiser(diffuse(x0, eps, level), level, condition)
        return len(self.chain) * self.chain.term(t.long(), x0, prediction, self.denoiser.variance)


class HybridLoss(DenoisingLoss):
    """L_simple + vlb_weight L_vlb, the mean stopped in L_vlb (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 16).

    L_vlb is T times the step's bits per dimension, as in their code, so that it estimates the whole bound.

    Args:
        denoiser: whose network is trained; its variance is learned.
        weighting: of the denoising part.
        time_sampling: which times the trainer draws.
        distance: of the denoising part (default: `Squared`).
        vlb_weight: 0.001 in the paper.

    Raises:
        ValueError: the variance is fixed, so that L_vlb would have nothing to train.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weighting: Weighting,
        time_sampling: TimeSampling,
        distance: Distance | None = None,
        vlb_weight: float = 0.001,
    ):
        super().__init__(denoiser, weighting, time_sampling, distance)
        if vlb_weight <= 0:
            raise ValueError(f"vlb_weight must be positive, got {vlb_weight}")
        self.vlb_weight = vlb_weight
        self.chain = Chain(denoiser.schedule)

    def check(self):
        if self.denoiser.variance.outputs == 1:
            raise ValueError(
                "denoiser has a fixed variance, so loss=hybrid trains nothing more: choose variance=learned_range, or"
                " loss=denoising"
            )

    def forward(self, x0, t, eps, condition=None):
        denoiser = self.denoiser
        level = denoiser.schedule(t)
        x_t = diffuse(x0, eps, level)
        output, said = denoiser.output(x_t, level, condition)
        stopped = denoiser.parameterization.predict(x_t, output.detach(), level).with_variance(said)
        vlb = len(self.chain) * self.chain.term(t.long(), x0, stopped, denoiser.variance)
        return self.weighted_error(output, x0, eps, level) + self.vlb_weight * vlb

"""The denoising loss: L_simple and weighted variants."""

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..distance import Distance, Squared
from ..forward import diffuse
from ..noise_level import NoiseLevel
from ..time_sampling import AdaptiveTimeSampling, TimeSampling
from ..weighting import LearnedUncertainty, Weighting
from .base import TimedLoss


class DenoisingLoss(TimedLoss):
    """The weighted error of the network's output F.

        weight(level_t) c_out^2 mean_pixels distance(F(x_t), target),    x_t = alpha_t x0 + sigma_t eps

    For eps-prediction with `Simple` weighting and squared distance this is L_simple of DDPM (Ho et al. 2020, eq. 14).

    Args:
        denoiser: the denoiser whose network is trained; its variance must be fixed.
        weighting: weight on the error of x0, by noise level.
        time_sampling: the distribution of times.
        distance: between output and target (default: `Squared`).

    Raises:
        ValueError: the denoiser's variance is learned, which this loss does not train, or adaptive time sampling is
            combined with `LearnedUncertainty`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weighting: Weighting,
        time_sampling: TimeSampling,
        distance: Distance | None = None,
    ):
        super().__init__(denoiser, time_sampling)
        self.weighting = weighting
        self.distance = distance or Squared()
        self.check_variance()
        if isinstance(weighting, LearnedUncertainty) and isinstance(time_sampling, AdaptiveTimeSampling):
            raise ValueError(
                "time_sampling=importance prefers the times of large losses, which weighting=learned_uncertainty makes"
                " equal: choose time_sampling=uniform, or weighting=edm"
            )

    def check_variance(self) -> None:
        """Raises ValueError if the loss does not support the denoiser's variance."""
        if self.denoiser.variance.outputs > 1:
            raise ValueError(
                "denoiser has a learned variance, which loss=denoising does not train: choose loss=hybrid or vlb,"
                " or variance=small"
            )

    def forward(self, x0, draws, eps, condition=None):
        level = self.denoiser.schedule(draws)
        x_t = diffuse(x0, eps, level)
        output, _ = self.denoiser.output(x_t, level, condition)
        return self.weighted_error(output, x0, eps, level)

    def weighted_error(self, output: Tensor, x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
        """The weighted distance of the network's output F from its target, shape (B,)."""
        parameterization = self.denoiser.parameterization
        target = parameterization.target(x0, eps, level)
        error = self.distance(output, target).flatten(1).mean(dim=1)
        c_out = torch.as_tensor(self.denoiser.coefficients(level)[2], dtype=torch.float64)
        weight = self.weighting(level, c_out) * c_out**2
        return self.weighting.balance(weight.to(error.device, error.dtype, non_blocking=True) * error, level)

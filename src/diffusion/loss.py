"""The training loss: the weighted error of the network's output.

    L(x0, t, eps) = weight(level_t) c_out^2 mean_pixels (F(x_t) - target)^2,    x_t = alpha_t x0 + sigma_t eps

For eps-prediction with `Simple` weighting this is L_simple of DDPM (Ho et al. 2020, eq. 14).
"""

import torch
from torch import Tensor, nn

from .denoiser import Denoiser
from .forward import diffuse
from .time_sampling import TimeSampling
from .weighting import Weighting


class DenoisingLoss(nn.Module):
    """Joins a denoiser, a weighting and a distribution of training times.

    Args:
        denoiser: whose network is trained.
        weighting: weight on the error of x0, by noise level.
        time_sampling: which times the trainer draws.
    """

    def __init__(self, denoiser: Denoiser, weighting: Weighting, time_sampling: TimeSampling):
        super().__init__()
        self.denoiser = denoiser
        self.weighting = weighting
        self.time_sampling = time_sampling

    def forward(self, x0: Tensor, t: Tensor, eps: Tensor, condition: Tensor | None = None) -> Tensor:
        """The loss of each image at a given time and noise.

        Args:
            x0: images in [-1, 1], shape (B, C, H, W).
            t: times, shape (B,), float64, on the CPU.
            eps: standard normal noise, x0's shape.
            condition: class labels, shape (B,), or None.

        Returns:
            Shape (B,), x0's dtype: mean over pixels, weighted.
        """
        denoiser = self.denoiser
        level = denoiser.schedule(t)
        x_t = diffuse(x0, eps, level)
        output = denoiser.output(x_t, level, condition).to(x0.dtype)
        target = denoiser.parameterization.target(x0, eps, level)
        error = (output - target).square().flatten(1).mean(dim=1)
        c_out = torch.as_tensor(denoiser.parameterization.coefficients(level)[2], dtype=torch.float64)
        weight = self.weighting(level, c_out) * c_out**2
        return weight.to(error.device, error.dtype, non_blocking=True) * error

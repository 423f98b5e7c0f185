"""Clipping of the x0 estimate to the range of images, as denoiser wrappers.

After x0 is clipped, eps is recomputed so that x_t = alpha_t x0 + sigma_t eps still holds, as in improved DDPM's code
(diffusers keeps the raw eps unless use_clipped_model_output is set).
"""

import torch
from torch import Tensor

from .denoiser import BaseDenoiser, WrappedDenoiser


class StaticClipping(WrappedDenoiser):
    """Clips x0 to [-bound, bound] (DDPM's code; "static thresholding" of Imagen, Saharia et al. 2022).

    Args:
        inner: the denoiser whose x0 is clipped.
        bound: 1 for images in [-1, 1].

    Raises:
        ValueError: bound is not positive.
    """

    def __init__(self, inner: BaseDenoiser, bound: float = 1.0):
        super().__init__(inner)
        if bound <= 0:
            raise ValueError(f"bound must be positive, got {bound}")
        self.bound = bound

    def forward(self, x_t, level, condition=None, to=None):
        prediction = self.inner(x_t, level, condition, to)
        # mix returns a new tensor, so clamping in place is safe
        return prediction.with_x0(prediction.mix(1.0, 0.0).clamp_(-self.bound, self.bound))


class DynamicThresholding(WrappedDenoiser):
    """Rescales x0 by a quantile of its absolute values (Imagen, Saharia et al. 2022, arXiv:2205.11487, sec. 2.3).

        x0 <- clip(x0, -s bound, s bound) / s,    s = max(bound, the image's quantile of |x0|) / bound

    This prevents saturated pixels under strong guidance.

    Args:
        inner: the denoiser whose x0 is clipped.
        quantile: quantile of the absolute pixel values of each image, in (0, 1].
        bound: 1 for images in [-1, 1].

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, inner: BaseDenoiser, quantile: float = 0.995, bound: float = 1.0):
        super().__init__(inner)
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile must be in (0, 1], got {quantile}")
        if bound <= 0:
            raise ValueError(f"bound must be positive, got {bound}")
        self.quantile, self.bound = quantile, bound

    def forward(self, x_t, level, condition=None, to=None):
        prediction = self.inner(x_t, level, condition, to)
        threshold = self._quantiles(prediction.x0).clamp(min=self.bound)
        return prediction.with_x0(prediction.x0.clamp(-threshold, threshold) * (self.bound / threshold))

    def _quantiles(self, x0: Tensor) -> Tensor:
        """The quantile of |x0| of each image, shape (B, 1, 1, 1), interpolated linearly between pixels."""
        magnitudes = x0.flatten(1).abs()
        # topk instead of torch.quantile, which raises an error for more than 16 million pixels
        place = self.quantile * (magnitudes.shape[1] - 1)
        largest = magnitudes.topk(magnitudes.shape[1] - int(place), dim=1).values
        upper = largest[:, max(largest.shape[1] - 2, 0)]
        value = torch.lerp(largest[:, -1], upper, place - int(place))
        return value.view(-1, *[1] * (x0.dim() - 1))

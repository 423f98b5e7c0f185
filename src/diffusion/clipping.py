"""Keeping the estimate of x0 inside the range of images: denoisers around denoisers.

After x0 has been clipped, eps is computed anew, so that x_t = alpha_t x0 + sigma_t eps still holds
(improved DDPM's code does so; diffusers keeps the raw eps unless it is asked).
"""

from dataclasses import replace

from .denoiser import BaseDenoiser, WrappedDenoiser
from .parameterization import eps_from_x0


class StaticClipping(WrappedDenoiser):
    """Clips x0 to [-bound, bound] (DDPM's code; "static thresholding" of Imagen, Saharia et al. 2022).

    Args:
        inner: the denoiser that is asked.
        bound: 1 for images in [-1, 1].

    Raises:
        ValueError: bound is not positive.
    """

    def __init__(self, inner: BaseDenoiser, bound: float = 1.0):
        super().__init__(inner)
        if bound <= 0:
            raise ValueError(f"bound must be positive, got {bound}")
        self.bound = bound

    def forward(self, x_t, level, condition=None):
        prediction = self.inner(x_t, level, condition)
        x0 = prediction.x0.clamp(-self.bound, self.bound)
        return replace(prediction, x0=x0, eps=eps_from_x0(x_t, x0, level))

"""Guidance: denoisers that combine the predictions of a conditional denoiser with weaker ones.

    F = F_weak + scale (F_conditional - F_weak)

for the network's output F and so for x0, eps and the score alike, since all are affine in F with equal coefficients.
scale = 1 is the conditional denoiser. Ho & Salimans (2022) write w = scale - 1; Stable Diffusion, Imagen, EDM2 and
diffusers write the scale as it is here.
"""

import math
from collections.abc import Sequence

import torch

from src.conditioning import Condition

from .denoiser import BaseDenoiser, WrappedDenoiser
from .noise_level import NoiseLevel
from .parameterization import Prediction


class ClassifierFree(WrappedDenoiser):
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, eq. 6): the weak prediction has no condition.

    The network must have been trained with `conditioning.dropout` above 0. It costs two evaluations per call where
    guidance is active, one elsewhere and with scale 1.

    Args:
        inner: a conditional denoiser.
        scale: at least 0; 1 is the conditional denoiser, bit for bit, and 0 the unconditional one.
        interval: the sigma/alpha in (low, high] for which guidance is active (Kynkäänniemi et al. 2024,
            arXiv:2404.07724, eq. 5); the conditional prediction is used elsewhere. None for all.
        rescale: phi of Lin et al. 2023 (arXiv:2305.08891, eq. 15 and 16): the share of an F that is rescaled, image by
            image, to the standard deviation of the conditional F, in [0, 1]; 0.7 in the paper, 0 for none.
        batched: evaluate both predictions in one call of twice the batch size; False needs less memory.

    Raises:
        ValueError: an argument is out of range; at sampling, images without a condition.
    """

    def __init__(
        self,
        inner: BaseDenoiser,
        scale: float,
        interval: Sequence[float] | None = None,
        rescale: float = 0.0,
        batched: bool = True,
    ):
        super().__init__(inner)
        if scale < 0:
            raise ValueError(f"scale must be at least 0, got {scale}")
        low, high = (0.0, math.inf) if interval is None else interval
        if not 0 <= low < high:
            raise ValueError(f"interval must be [low, high] with 0 <= low < high, got {list(interval)}")
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale must be in [0, 1], got {rescale}")
        self.scale, self.low, self.high = scale, low, high
        self.rescale, self.batched = rescale, batched

    def forward(self, x_t, level, condition=None, to=None):
        if condition is None or not condition.kinds:
            raise ValueError("guidance needs images with a condition, got none")
        if self.scale == 1 or not self._is_active(level):
            return self.inner(x_t, level, condition, to)
        if self.scale == 0:
            return self.inner(x_t, level, condition.dropped(), to)
        if self.batched and isinstance(level.alpha, float):
            both = Condition.cat([condition, condition.dropped()])
            conditional, weak = self.inner(torch.cat([x_t, x_t]), level, both, to).chunk(2)
        else:
            conditional = self.inner(x_t, level, condition, to)
            weak = self.inner(x_t, level, condition.dropped(), to)
        return guided(conditional, weak, self.scale, self.rescale)

    def _is_active(self, level: NoiseLevel) -> bool:
        if (self.low, self.high) == (0.0, math.inf):
            return True
        if not isinstance(level.alpha, float):
            raise ValueError("interval of guidance needs one noise level for all images, as in sampling")
        noise = level.sigma / level.alpha if level.alpha > 0 else math.inf
        return self.low < noise <= self.high


def guided(conditional: Prediction, weak: Prediction, scale: float, rescale: float = 0.0) -> Prediction:
    """The prediction with F = F_weak + scale (F_conditional - F_weak), rescaled as `ClassifierFree` describes.

    Args:
        conditional: the prediction with the condition; its variance is kept.
        weak: of the same images and level.
        scale: see the module.
        rescale: phi, in [0, 1].
    """
    strong = conditional.output
    mixed = torch.lerp(weak.output, strong, scale)
    if rescale:
        dims = tuple(range(1, strong.dim()))
        ratio = strong.std(dim=dims, keepdim=True) / mixed.std(dim=dims, keepdim=True)
        mixed = mixed * (rescale * ratio + (1 - rescale))
    return conditional.with_output(mixed)

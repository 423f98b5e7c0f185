"""Guidance: denoisers that move a denoiser's predictions away from a weaker one's, or along a classifier's gradient.

    F = F_weak + scale (F_strong - F_weak)

for the network's output F and so for x0, eps and the score alike, since all are affine in F with equal coefficients.
scale = 1 is the strong denoiser. Ho & Salimans (2022) write w = scale - 1; Stable Diffusion, Imagen, EDM2 and
diffusers write the scale as it is here.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from src.conditioning import Condition

from .classifier import NoiseClassifier
from .denoiser import BaseDenoiser, Gaussian, WrappedDenoiser
from .noise_level import NoiseLevel, broadcast
from .parameterization import Prediction


class Guidance(WrappedDenoiser):
    """A guided denoiser. Outside of the interval it is the inner denoiser.

    Args:
        inner: the denoiser that is guided.
        scale: strength of the guidance, at least `least_scale`.
        interval: the sigma/alpha in (low, high] for which guidance is active (Kynkäänniemi et al. 2024,
            arXiv:2404.07724, eq. 5); None for all.

    Attributes:
        least_scale: the smallest scale.
        plain_scale: the scale without effect, for which only the inner denoiser is evaluated.

    Raises:
        ValueError: an argument is out of range.
    """

    least_scale = 0
    plain_scale = 1

    def __init__(self, inner: BaseDenoiser, scale: float, interval: Sequence[float] | None = None):
        super().__init__(inner)
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        if scale < self.least_scale:
            raise ValueError(f"scale must be at least {self.least_scale}, got {scale}")
        low, high = (0.0, math.inf) if interval is None else interval
        if not 0 <= low < high:
            raise ValueError(f"interval must be [low, high] with 0 <= low < high, got {list(interval)}")
        self.scale, self.low, self.high = scale, low, high

    def forward(self, x_t, level, condition=None, to=None):
        guide = self.guide if self.is_active(level) else self.strong
        return guide(x_t, level, condition, to)

    def strong(
        self, x_t: Tensor, level: NoiseLevel, condition: Condition | None, to: NoiseLevel | None
    ) -> Prediction:
        """The prediction that is guided; arguments as in `forward`."""
        return self.inner(x_t, level, condition, to)

    @abstractmethod
    def guide(
        self, x_t: Tensor, level: NoiseLevel, condition: Condition | None, to: NoiseLevel | None
    ) -> Prediction:
        """The guided prediction; arguments as in `forward`."""

    def is_active(self, level: NoiseLevel) -> bool:
        """Whether predictions at this level are guided."""
        if self.scale == self.plain_scale:
            return False
        if (self.low, self.high) == (0.0, math.inf):
            return True
        if not isinstance(level.alpha, float):
            raise ValueError("interval of guidance needs one noise level for all images, as in sampling")
        noise = level.sigma / level.alpha if level.alpha > 0 else math.inf
        return self.low < noise <= self.high


class ClassifierFree(Guidance):
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, eq. 6): the weak prediction has no condition.

    The network must have been trained with `conditioning.dropout` above 0. It costs two evaluations per call where
    guidance is active, one elsewhere and with scale 1.

    Args:
        inner: a conditional denoiser.
        scale: at least 0; 1 is the conditional denoiser, bit for bit, and 0 the unconditional one.
        interval: see `Guidance`.
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
        super().__init__(inner, scale, interval)
        self.rescale, self.batched = check_rescale(rescale), batched

    def forward(self, x_t, level, condition=None, to=None):
        if condition is None or not condition.kinds:
            raise ValueError("guidance needs images with a condition, got none")
        return super().forward(x_t, level, condition, to)

    def guide(self, x_t, level, condition, to):
        if self.scale == 0:
            return self.inner(x_t, level, condition.dropped(), to)
        if self.batched and isinstance(level.alpha, float):
            both = Condition.cat([condition, condition.dropped()])
            conditional, weak = self.inner(torch.cat([x_t, x_t]), level, both, to).chunk(2)
        else:
            conditional = self.strong(x_t, level, condition, to)
            weak = self.inner(x_t, level, condition.dropped(), to)
        return self.combine(conditional, weak)

    def combine(self, conditional: Prediction, weak: Prediction) -> Prediction:
        """The guided prediction from those with and without the condition."""
        return guided(conditional, weak.output, self.scale, self.rescale)


class Projected(ClassifierFree):
    """Adaptive projected guidance (Sadat et al. 2024, arXiv:2410.02416, sec. 4 and alg. 1), for large scales.

        f = F_conditional - F_weak + momentum f_before,    d = c_out f,    d <- d min(1, threshold / |d|)
        x0 = x0_conditional + (scale - 1) (d - (1 - eta) d_parallel)

    d_parallel is the part of d along x0_conditional, which saturates colours. With the defaults except eta = 1 this is
    classifier-free guidance. The momentum is a state of the trajectory of each image: f_before is that of the previous
    guided evaluation, and a sampler clears it first. One object can follow one trajectory at a time.

    The paper averages x0, where F is x0. As in diffusers, the average here is of the network's output F. An average of
    x0 from an eps network on the cosine schedule has differences of the first evaluation with a gain c_out of 20,000,
    which swamp all later ones. At few steps, where evaluations differ much, a momentum of 0 is recommended.

    Args:
        inner: a conditional denoiser.
        scale: at least 1.
        eta: share of the parallel part that is kept; 0 in the paper.
        threshold: largest norm of d over an image, e.g. 2.5 to 15 in the paper; it grows with the square root of the
            number of pixels. None for no limit.
        momentum: weight of the previous f, in (-1, 1); -0.75 to -0.25 in the paper, 0 for none.
        interval: see `Guidance`.
        batched: see `ClassifierFree`.

    Raises:
        ValueError: an argument is out of range; at sampling, images without a condition.
    """

    least_scale = 1

    def __init__(
        self,
        inner: BaseDenoiser,
        scale: float,
        eta: float = 0.0,
        threshold: float | None = None,
        momentum: float = 0.0,
        interval: Sequence[float] | None = None,
        batched: bool = True,
    ):
        super().__init__(inner, scale, interval, batched=batched)
        if not math.isfinite(eta):
            raise ValueError(f"eta must be finite, got {eta}")
        if threshold is not None and not threshold > 0:
            raise ValueError(f"threshold must be positive, got {threshold}")
        if not -1 < momentum < 1:
            raise ValueError(f"momentum must be in (-1, 1), got {momentum}")
        self.eta, self.threshold, self.momentum = eta, threshold, momentum
        self.reset()

    def reset(self):
        super().reset()
        self._average: Tensor | None = None

    def combine(self, conditional, weak):
        x0 = conditional.x0
        f = conditional.output - weak.output_as(conditional)
        if self.momentum:
            f = self._average = f if self._average is None else f + self.momentum * self._average
        d = conditional.shift_of(f)
        if self.threshold is not None:
            d = d * (self.threshold / _dot(d, d).sqrt()).clamp(max=1)
        parallel = _dot(d, x0) / _dot(x0, x0).clamp(min=torch.finfo(x0.dtype).tiny) * x0
        return conditional.with_shift((self.scale - 1) * (d - (1 - self.eta) * parallel))


class AutoGuidance(Guidance):
    """Guidance by a weaker version of the denoiser (Karras et al. 2024, arXiv:2406.02507, eq. 4).

    The weak denoiser has the same schedule and, where it is conditional, the same condition: a smaller or less trained
    network, or one without a condition. Neither denoiser needs a condition. It costs an evaluation of each, and one of
    the inner denoiser elsewhere and with scale 1.

    Args:
        inner: the denoiser that is guided.
        weak: the weaker denoiser; its parameterisation may be another.
        scale: at least 0; 1 is the inner denoiser, bit for bit, and 0 the weak one.
        interval: see `Guidance`.
        rescale: see `ClassifierFree`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        inner: BaseDenoiser,
        weak: BaseDenoiser,
        scale: float,
        interval: Sequence[float] | None = None,
        rescale: float = 0.0,
    ):
        super().__init__(inner, scale, interval)
        self.weak, self.rescale = weak, check_rescale(rescale)

    @property
    def evaluated_images(self):
        return self.inner.evaluated_images + self.weak.evaluated_images

    def guide(self, x_t, level, condition, to):
        weak = self.weak(x_t, level, condition, to)
        if self.scale == 0:
            return weak
        strong = self.strong(x_t, level, condition, to)
        return guided(strong, weak.output_as(strong), self.scale, self.rescale)


class ClassifierGuidance(Guidance):
    """Guidance by a classifier of noisy images (Dhariwal & Nichol 2021, arXiv:2105.05233).

        reverse:      mean + scale variance g       (alg. 1; ancestral sampling)
        elsewhere:    eps - scale sigma_t g         (alg. 2)      g = grad ln p(class | x_t)

    scale = 1 samples p(x | class) if the denoiser and the classifier are exact. At alpha = 0, where x_t has no
    information about the class, predictions are not guided. Alg. 1 applies where this is the outermost wrapper; then
    the prediction is clipped before it is guided, as in the paper's code. It costs one evaluation of each network.

    Args:
        inner: the denoiser that is guided; conditional or not.
        classifier: a classifier on the same schedule.
        scale: at least 0; 0 is the inner denoiser.
        interval: see `Guidance`.
        conditional: whether the inner denoiser is given the condition too.

    Raises:
        ValueError: an argument is out of range; at sampling, images without a class.
    """

    plain_scale = 0

    def __init__(
        self,
        inner: BaseDenoiser,
        classifier: NoiseClassifier,
        scale: float,
        interval: Sequence[float] | None = None,
        conditional: bool = False,
    ):
        super().__init__(inner, scale, interval)
        self.classifier, self.conditional = classifier, conditional

    @property
    def evaluated_images(self):
        return self.inner.evaluated_images + self.classifier.evaluated_images

    def strong(self, x_t, level, condition, to):
        return self.inner(x_t, level, condition if self.conditional else None, to)

    def guide(self, x_t, level, condition, to):
        prediction = self.strong(x_t, level, condition, to)
        if isinstance(level.alpha, float) and level.alpha == 0:
            return prediction
        # x0 = (x_t - sigma eps) / alpha
        gain = self.scale * level.sigma**2 / level.alpha
        return prediction.with_shift(broadcast(gain, x_t) * self._gradient(x_t, level, condition))

    def reverse(self, x_t, t, s, condition=None):
        unguided = self.inner.reverse(x_t, t, s, condition if self.conditional else None)
        if not self.is_active(t):
            return unguided
        shift = self.scale * unguided.variance * self._gradient(x_t, t, condition)
        return Gaussian(unguided.mean + shift, unguided.variance, unguided.prediction)

    def _gradient(self, x_t: Tensor, level: NoiseLevel, condition: Condition | None) -> Tensor:
        if condition is None or condition.labels is None:
            raise ValueError("guidance by a classifier needs images with a class, got none")
        return self.classifier.gradient(x_t, level, condition.labels)


def guided(strong: Prediction, weak: Tensor, scale: float, rescale: float = 0.0) -> Prediction:
    """The prediction with F = F_weak + scale (F_strong - F_weak), rescaled as `ClassifierFree` describes.

    Args:
        strong: the stronger prediction; its variance is kept.
        weak: F of the weaker prediction, in the parameterisation of the stronger one.
        scale: see the module.
        rescale: phi, in [0, 1].
    """
    mixed = torch.lerp(weak, strong.output, scale)
    if rescale:
        dims = tuple(range(1, mixed.dim()))
        ratio = strong.output.std(dim=dims, keepdim=True) / mixed.std(dim=dims, keepdim=True)
        mixed = mixed * (rescale * ratio + (1 - rescale))
    return strong.with_output(mixed)


def check_rescale(rescale: float) -> float:
    """Returns phi.

    Raises:
        ValueError: it is not in [0, 1].
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must be in [0, 1], got {rescale}")
    return rescale


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each image, shape (B, 1, 1, 1)."""
    return (a * b).sum(dim=tuple(range(1, a.dim())), keepdim=True)

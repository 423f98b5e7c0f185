"""The continuous schedules of the literature: alpha_t and sigma_t in closed form."""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..noise_level import NoiseLevel, as_times
from .base import Schedule


class ContinuousSchedule(Schedule):
    """alpha and sigma as functions of t in (0, t_max]; t = 0 is always clean data, even if the formula differs.

    The label is 999 t, as for score SDE's VP networks, so that time embeddings designed for the indices 0 ... 999 of
    published checkpoints cover [0, 1].

    Args:
        t_min: the smallest time used in training and by the spacings, in (0, t_max). Smaller times may be passed
            explicitly.
        t_max: the largest time.

    Raises:
        ValueError: not 0 < t_min < t_max.
    """

    def __init__(self, t_min: float, t_max: float):
        if not 0 < t_min < t_max:
            raise ValueError(f"t_min must be in (0, t_max={t_max:g}), got {t_min:g}")
        self.t_min, self.t_max = float(t_min), float(t_max)

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma in closed form at float64 times t > 0."""

    def label(self, t: Tensor) -> Tensor:
        """The time passed to the network."""
        return 999 * t

    def __call__(self, t: Tensor | Sequence[float]) -> NoiseLevel:
        t = as_times(t)
        if ((t < 0) | (t > self.t_max * (1 + 1e-6))).any():  # float32 times may round above t_max
            raise ValueError(f"times must be in [0, {self.t_max:g}], got {t.min():g} to {t.max():g}")
        t = t.clamp(max=self.t_max)
        alpha, sigma = self.alpha_sigma(t)
        clean = t == 0
        return NoiseLevel(alpha.masked_fill(clean, 1.0), sigma.masked_fill(clean, 0.0), self.label(t))

    def drift_and_diffusion(self, t: float) -> tuple[float, float]:
        time = as_times(t)
        (alpha, sigma), (d_alpha, d_sigma) = torch.func.jvp(
            self.alpha_sigma, (time,), (torch.ones_like(time),)
        )
        f = d_alpha / alpha
        return f.item(), (2 * sigma * (d_sigma - f * sigma)).item()

    def time_at(self, u: Tensor) -> Tensor:
        return self.t_min + u * (self.t_max - self.t_min)

    def quantile(self, t: Tensor) -> Tensor:
        return (t - self.t_min) / (self.t_max - self.t_min)


def _upper_bound_of_one(t_max: float) -> None:
    if t_max > 1:
        raise ValueError(f"t_max must be at most 1, got {t_max:g}")


class VP(ContinuousSchedule):
    """The variance-preserving SDE (Song et al. 2021, arXiv:2011.13456, eq. 33).

        ln alpha_t = -t^2 (beta_max - beta_min)/4 - t beta_min/2,    sigma_t^2 = 1 - alpha_t^2

    The limit of DDPM's linear schedule. The paper trains down to t_min = 1e-5 and samples down to 1e-3.

    Args:
        beta_min: beta at t = 0.
        beta_max: beta at t = 1, above beta_min.
        t_min: the smallest time.
        t_max: the largest, at most 1.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-5, t_max: float = 1.0
    ):
        if not 0 < beta_min < beta_max:
            raise ValueError(f"beta_min must be in (0, beta_max={beta_max:g}), got {beta_min:g}")
        _upper_bound_of_one(t_max)
        super().__init__(t_min, t_max)
        self.beta_min, self.beta_max = beta_min, beta_max

    def alpha_sigma(self, t):
        log_alpha = -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def time_of_log_snr(self, log_snr):
        minus_log_alpha = torch.nn.functional.softplus(-2 * as_times(log_snr)) / 2
        slope = self.beta_max - self.beta_min
        # the form of the root without cancellation at small t
        root = (self.beta_min**2 / 4 + slope * minus_log_alpha).sqrt()
        t = 2 * minus_log_alpha / (self.beta_min / 2 + root)
        return t.where(minus_log_alpha.isfinite(), torch.inf)


class VE(ContinuousSchedule):
    """The variance-exploding SDE: alpha = 1, sigma_t = sigma_min (sigma_max/sigma_min)^t (Song et al. 2021, eq. 31).

    Args:
        sigma_min: sigma at the smallest time, for images in [-1, 1].
        sigma_max: sigma at t = 1, about the largest distance between two images (50 for CIFAR-10).
        t_min: the smallest time.
        t_max: the largest, at most 1.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, sigma_min: float = 0.01, sigma_max: float = 50.0, t_min: float = 1e-5, t_max: float = 1.0
    ):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min must be in (0, sigma_max={sigma_max:g}), got {sigma_min:g}")
        _upper_bound_of_one(t_max)
        super().__init__(t_min, t_max)
        self.sigma_min, self.log_range = sigma_min, math.log(sigma_max / sigma_min)

    def alpha_sigma(self, t):
        return torch.ones_like(t), self.sigma_min * (t * self.log_range).exp()

    def time_of_log_snr(self, log_snr):
        return (-as_times(log_snr) - math.log(self.sigma_min)) / self.log_range


class EDM(ContinuousSchedule):
    """alpha = 1, sigma = t: the time is the noise level itself (Karras et al. 2022, arXiv:2206.00364, table 1).

    The label is ln(sigma)/4. Uniform time sampling is uniform in ln(sigma); the paper uses `log_normal`.

    Args:
        sigma_min: the smallest noise level.
        sigma_max: the largest.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max.
    """

    straight = True

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min must be in (0, sigma_max={sigma_max:g}), got {sigma_min:g}")
        super().__init__(sigma_min, sigma_max)
        self.log_range = math.log(sigma_max / sigma_min)

    def alpha_sigma(self, t):
        return torch.ones_like(t), t

    def label(self, t):
        return t.log() / 4

    def time_of_log_snr(self, log_snr):
        return (-as_times(log_snr)).exp()

    def time_at(self, u):
        return (self.t_min * (u * self.log_range).exp()).clamp(self.t_min, self.t_max)  # rounding

    def quantile(self, t):
        return (t / self.t_min).log() / self.log_range


class ContinuousCosine(ContinuousSchedule):
    """ln(alpha/sigma) = -ln tan(pi t/2) + ln(base_size/image_size), alpha^2 + sigma^2 = 1.

    The cosine schedule in continuous time (Kingma & Gao 2023, arXiv:2303.00848), shifted with the resolution as in
    simple diffusion (Hoogeboom et al. 2023, arXiv:2301.11093, eq. 4), since larger images need more noise.

    Args:
        image_size: side length of the images in pixels, or [height, width], of which the geometric mean is used.
        base_size: the side length at which the schedule is not shifted.
        t_min: the smallest time.
        t_max: the largest, below 1, where ln(alpha/sigma) is infinite. The defaults bound |ln(alpha/sigma)| by 8.8.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 64,
        base_size: int = 64,
        t_min: float = 1e-4,
        t_max: float = 0.9999,
    ):
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(height, width, base_size) < 1:
            raise ValueError(f"image_size and base_size must be positive, got {image_size} and {base_size}")
        if t_max >= 1:
            raise ValueError(f"t_max must be below 1, got {t_max:g}")
        super().__init__(t_min, t_max)
        self.shift = math.log(base_size / math.sqrt(height * width))

    def alpha_sigma(self, t):
        log_snr = self.shift - torch.tan(math.pi / 2 * t).log()
        return torch.sigmoid(2 * log_snr).sqrt(), torch.sigmoid(-2 * log_snr).sqrt()

    def time_of_log_snr(self, log_snr):
        return torch.atan((self.shift - as_times(log_snr)).exp()) * 2 / math.pi


class RectifiedFlow(ContinuousSchedule):
    """alpha = 1 - t, sigma = t (Liu et al. 2023, arXiv:2209.03003; Lipman et al. 2023, arXiv:2210.02747).

    The papers use the opposite direction of time; here t = 1 is noise, as in all schedules. At t_max = 1, pure noise,
    only parameterisations that do not divide by alpha are defined (velocity, v, x0, edm).

    Args:
        t_min: the smallest time (1e-3 in the rectified flow code).
        t_max: the largest, at most 1.
        label_scale: the network's label of t = 1. Losses that derive the network by the time need a smaller one: the
            derivative of an embedding of frequencies up to 1 grows with it.

    Raises:
        ValueError: an argument is out of range.
    """

    straight = True

    def __init__(self, t_min: float = 1e-3, t_max: float = 1.0, label_scale: float = 999.0):
        _upper_bound_of_one(t_max)
        if label_scale <= 0:
            raise ValueError(f"label_scale must be positive, got {label_scale:g}")
        super().__init__(t_min, t_max)
        self.label_scale = label_scale

    def label(self, t):
        return self.label_scale * t

    def alpha_sigma(self, t):
        return 1 - t, t

    def time_of_log_snr(self, log_snr):
        return torch.sigmoid(-as_times(log_snr))

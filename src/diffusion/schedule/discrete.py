"""The discrete schedules of the literature, as tables of alphabar_t = prod_{i <= t} (1 - beta_i)."""

import math

import torch
from torch import Tensor

from .base import DiscreteSchedule


def _alphabar(beta: Tensor) -> Tensor:
    if not ((beta > 0) & (beta < 1)).all():
        raise ValueError(
            f"T, beta_start and beta_end must keep every beta in (0, 1), got {beta.min():.3g} to {beta.max():.3g}"
            " (T below about 21 needs a smaller beta_end)"
        )
    return torch.cumprod(1 - beta, dim=0)


LARGEST_T = 1_000_000


def _linspace(start: float, end: float, T: int) -> Tensor:
    if T < 1:
        raise ValueError(f"T must be at least 1, got {T}")
    if T > LARGEST_T:
        raise ValueError(f"T must be at most {LARGEST_T:,}, got {T}")
    return torch.linspace(start, end, T, dtype=torch.float64)


class Linear(DiscreteSchedule):
    """beta evenly spaced from beta_start 1000/T to beta_end 1000/T.

    DDPM (Ho et al. 2020, sec. 4) for T = 1000. The factor 1000/T, which preserves the total noise, is from improved
    DDPM (Nichol & Dhariwal 2021, arXiv:2102.09672).

    Args:
        T: number of steps.
        beta_start: beta_1 at T = 1000.
        beta_end: beta_T at T = 1000.

    Raises:
        ValueError: a beta is outside (0, 1).
    """

    def __init__(self, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02):
        scale = 1000 / max(T, 1)
        super().__init__(_alphabar(_linspace(beta_start * scale, beta_end * scale, T)))


class ScaledLinear(DiscreteSchedule):
    """sqrt(beta) evenly spaced: the schedule of latent diffusion and Stable Diffusion (Rombach et al. 2022).

    Not scaled with T. Its terminal alphabar (4.7e-3 at T = 1000) leaks the image's mean into x_T.

    Args:
        T: number of steps.
        beta_start: beta_1.
        beta_end: beta_T.
    """

    def __init__(self, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012):
        super().__init__(_alphabar(_linspace(beta_start**0.5, beta_end**0.5, T) ** 2))


class Quadratic(ScaledLinear):
    """sqrt(beta) evenly spaced over DDPM's range: "quad" among the ablations of the DDPM code (Ho et al. 2020)."""

    def __init__(self, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02):
        super().__init__(T, beta_start, beta_end)


class Cosine(DiscreteSchedule):
    """alphabar(u) = f(u) / f(0), f(u) = cos^2((u + s) / (1 + s) pi / 2), u = t/T, with beta_t <= beta_max.

    Improved DDPM (Nichol & Dhariwal 2021, eq. 17). Only the last beta reaches the bound, which gives
    alphabar_T = 2.4e-9 at T = 1000. There, errors of a predicted eps are multiplied by 20,000 in x0, so clip x0.

    Args:
        T: number of steps.
        s: offset that prevents beta_1 from being too small.
        beta_max: upper bound of beta_t.
    """

    def __init__(self, T: int = 1000, s: float = 0.008, beta_max: float = 0.999):
        f = torch.cos((_linspace(0, 1, T + 1) + s) / (1 + s) * math.pi / 2) ** 2
        super().__init__(_alphabar((1 - f[1:] / f[:-1]).clamp(max=beta_max)))


class Sigmoid(DiscreteSchedule):
    """alphabar is a sigmoid of u = t/T (Jabri et al. 2022, arXiv:2212.11972; Chen 2023, arXiv:2301.10972).

        alphabar(u) = (sig(end/tau) - sig((u (end - start) + start)/tau)) / (sig(end/tau) - sig(start/tau))

    Other code uses the same name for a sigmoid in beta (`SigmoidBeta`).

    Args:
        T: number of steps.
        start: left end of the sigmoid's argument.
        end: right end.
        tau: temperature.
        minimum: lower bound of alphabar, reached at T.
    """

    def __init__(
        self, T: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0, minimum: float = 1e-9
    ):
        u = _linspace(0, 1, T + 1)[1:]
        low, high = (torch.sigmoid(torch.tensor(v / tau, dtype=torch.float64)) for v in (start, end))
        alphabar = (high - torch.sigmoid((u * (end - start) + start) / tau)) / (high - low)
        super().__init__(alphabar.clamp(min=minimum))


class SigmoidBeta(DiscreteSchedule):
    """beta is a sigmoid: beta_start + (beta_end - beta_start) sig(x), x evenly spaced in [-6, 6].

    "sigmoid" in the DDIM code (Song et al. 2021) and in diffusers; `Sigmoid` is a sigmoid in alphabar. Not scaled
    with T.

    Args:
        T: number of steps.
        beta_start: lower bound of beta.
        beta_end: upper bound of beta.
    """

    def __init__(self, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02):
        super().__init__(_alphabar(beta_start + (beta_end - beta_start) * torch.sigmoid(_linspace(-6, 6, T))))


class Constant(DiscreteSchedule):
    """The same beta at every step: "const" among the ablations of the DDPM code (Ho et al. 2020).

    Args:
        T: number of steps.
        beta: beta of every step; not scaled with T.
    """

    def __init__(self, T: int = 1000, beta: float = 0.02):
        super().__init__(_alphabar(_linspace(beta, beta, T)))


class JSD(DiscreteSchedule):
    """beta_t = 1/(T - t + 1), hence alphabar_t = 1 - t/T (Sohl-Dickstein et al. 2015, arXiv:1503.03585, sec. 2.4.1).

    "jsd" in the DDPM code. It ends at pure noise, alphabar_T = 0.

    Args:
        T: number of steps.
    """

    def __init__(self, T: int = 1000):
        super().__init__(1 - _linspace(1, T, T) / T)


class ZeroTerminalSNR(DiscreteSchedule):
    """A table with sqrt(alphabar) shifted and scaled so that alphabar_T = 0 and alphabar_1 is unchanged.

    Lin et al. 2023 (arXiv:2305.08891, alg. 1). The network is then also trained on pure noise, where sampling starts;
    its parameterisation must be defined there: v, x0, velocity or edm.

    Args:
        inner: the schedule to rescale.

    Raises:
        ValueError: the inner schedule has fewer than two steps.
    """

    def __init__(self, inner: DiscreteSchedule):
        root = inner.alphabar[1:].sqrt()
        if inner.T < 2:
            raise ValueError("inner must have at least 2 steps: raise its T")
        super().__init__(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)

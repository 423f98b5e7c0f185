"""DPM-Solver and DPM-Solver++, single-step and multi-step, with their ancestral and SDE versions."""

import math
from itertools import pairwise
from typing import Literal

import torch

from ..noise_level import NoiseLevel
from ..schedule import Schedule
from .base import Path, Sampler, State, ancestral_split, check_order, is_endless, level_between, weighted_sum
from .exponential import form, phi_2, phi_3

# the power of the time in which the inner levels of a single step are uniform
POWERS = {"time": 1.0, "sqrt_time": 0.5}


class SinglestepDPMSolver(Sampler):
    """DPM-Solver-2 and -3 (Lu et al. 2022a, arXiv:2206.00927, alg. 1 and 2), DPM-Solver++(2S), (3S) (Lu et al. 2022b).

    The order is also the number of evaluations per step, at t and at the inner levels; steps from pure noise or to
    clean data take one. The inner levels divide the step uniformly in the log-SNR (r1 = 1/2, or r1 = 1/3 and
    r2 = 2/3), as in the papers; the authors' code divides it in the variable in which its grid is uniform (skip_type
    logSNR, time_uniform, time_quadratic). With eta > 0 each step goes to a lower level and adds noise back:
    k-diffusion's DPM++ 2S ancestral.

    Args:
        order: 2 or 3.
        plus_plus: integrate x0 (DPM-Solver++) instead of eps (DPM-Solver).
        eta: amount of noise as in DDIM, in [0, 1]; 0 is deterministic.
        nodes: the variable in which the inner levels are uniform: log_snr, time or sqrt_time.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        order: int = 2,
        plus_plus: bool = True,
        eta: float = 0.0,
        nodes: Literal["log_snr", "time", "sqrt_time"] = "log_snr",
    ):
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        if nodes not in ("log_snr", *POWERS):
            raise ValueError(f"nodes must be log_snr, {' or '.join(POWERS)}, got {nodes}")
        self.order, self.plus_plus, self.eta = check_order(order, 3, lowest=2), plus_plus, eta
        self.nodes = nodes

    def step(self, denoiser, x_t, t, s, noise, path):
        prediction = denoiser(x_t, t)
        down, std = ancestral_split(t, s, self.eta)
        if is_endless(t, down):
            x_s = prediction.mix(down.alpha, down.sigma)
        else:
            solve = self._second if self.order == 2 else self._third
            x_s = solve(denoiser, x_t, prediction, t, down, self._inner(denoiser.schedule, t, down, path))
        if std > 0:
            x_s.add_(noise(x_t), alpha=std)
        return State(x_s, prediction)

    def _inner(self, schedule: Schedule, t: NoiseLevel, s: NoiseLevel, path: Path) -> list[NoiseLevel]:
        """The inner levels of the step from t to s."""
        shares = [i / self.order for i in range(1, self.order)]
        if self.nodes == "log_snr":
            return [level_between(schedule, t, s, share, path) for share in shares]
        start, end = schedule.nearest_time([t.log_snr, s.log_snr], path.lowest) ** POWERS[self.nodes]
        even = torch.stack([torch.lerp(start, end, share) for share in shares])
        return schedule(even ** (1 / POWERS[self.nodes])).scalars()

    def _second(self, denoiser, x_t, prediction, t, s, inner):
        f = form(self.plus_plus)
        m, h = f.estimate(prediction), s.log_snr - t.log_snr
        (middle,) = inner
        x_middle = prediction.mix(middle.alpha, middle.sigma)
        m_middle = f.estimate(denoiser(x_middle, middle))
        slope = h / (2 * (middle.log_snr - t.log_snr))
        whole = -f.b(s) * math.expm1(f.k(h))
        return weighted_sum((f.a(s) / f.a(t), x_t), (whole * (1 - slope), m), (whole * slope, m_middle))

    def _third(self, denoiser, x_t, prediction, t, s, inner):
        f = form(self.plus_plus)
        m, h = f.estimate(prediction), s.log_snr - t.log_snr
        first, second = inner
        r1, r2 = ((level.log_snr - t.log_snr) / h for level in (first, second))
        m1 = f.estimate(denoiser(prediction.mix(first.alpha, first.sigma), first))
        k = f.k(h * r2)
        whole, curve = -f.b(second) * math.expm1(k), -f.b(second) * phi_2(k) * r2 / r1
        x_second = weighted_sum((f.a(second) / f.a(t), x_t), (whole - curve, m), (curve, m1))
        m2 = f.estimate(denoiser(x_second, second))
        k = f.k(h)
        whole, curve = -f.b(s) * math.expm1(k), -f.b(s) * phi_2(k) / r2
        return weighted_sum((f.a(s) / f.a(t), x_t), (whole - curve, m), (curve, m2))


class MultistepDPMSolver(Sampler):
    """DPM-Solver++(2M), (3M) and the multi-step DPM-Solver (Lu et al. 2022b, arXiv:2211.01095); SDE-DPM-Solver++.

        x_s = (a_s/a_t) e^(-eta h) x_t - b_s (expm1(k) m + c D1 + phi_3(k) D2) + std z
        k = -(1 + eta) h for x0 (h for eps),    std^2 = sigma_s^2 (1 - e^(-2 eta h))

    where D1, D2 are the first and second derivative of m estimated from the last `order` visits, in units of the step,
    and c is expm1(k)/2, as in the published second-order step, or phi_2(k). One evaluation per step. eta = 0 is the
    ODE, eta = 1 SDE-DPM-Solver++ (k-diffusion's 2M SDE and 3M SDE). The first step is of order 1.

    Args:
        order: 1, 2 or 3.
        plus_plus: integrate x0 (DPM-Solver++) instead of eps (DPM-Solver).
        eta: amount of noise, at least 0.
        midpoint: second-order steps with c = expm1(k)/2, as published, instead of phi_2(k).
        lower_order_final: limit the order of a step to the number of remaining steps, including this one: always
            (True), never (False), or in trajectories of fewer steps than this (15 in diffusers, 10 in the authors'
            code). The step to clean data is always of first order.
        half_curvature: use half of D2, as DPM-Solver's code, diffusers and k-diffusion do; "3M" is then of order 2.

    Raises:
        ValueError: an argument is out of range, or eta without plus_plus.
    """

    def __init__(
        self,
        order: int = 2,
        plus_plus: bool = True,
        eta: float = 0.0,
        midpoint: bool = True,
        lower_order_final: bool | int = 15,
        half_curvature: bool = False,
    ):
        if eta < 0:
            raise ValueError(f"eta must be at least 0, got {eta}")
        if eta > 0 and not plus_plus:
            raise ValueError(f"eta must be 0 with plus_plus=false, got {eta}")
        self.order, self.plus_plus, self.eta = check_order(order, 3), plus_plus, eta
        if lower_order_final < 0:
            raise ValueError(
                f"lower_order_final must be true, false or a number of steps, got {lower_order_final}"
            )
        self.midpoint, self.lower_order_final = midpoint, lower_order_final
        self.half_curvature = half_curvature

    @property
    def memory(self) -> int:
        return self.order - 1

    def step(self, denoiser, x_t, t, s, noise, path):
        prediction = denoiser(x_t, t)
        if self.eta > 0 and t.alpha == 0 and s.sigma > 0:
            # the limit of the infinite step, in which the weight of x_t is 0
            return State(weighted_sum((s.alpha, prediction.x0), (s.sigma, noise(x_t))), prediction)
        if is_endless(t, s):
            return State(prediction.mix(s.alpha, s.sigma), prediction)
        f = form(self.plus_plus)
        h = s.log_snr - t.log_snr
        k = f.k(h) * (1 + self.eta)
        carried = f.a(s) / f.a(t) * math.exp(-self.eta * h)
        past = self._past(path)
        estimates = [f.estimate(prediction), *(f.estimate(visit.prediction) for visit in past)]
        weights = self._weights(k, h, [t, *(visit.level for visit in past)])
        x_s = weighted_sum(
            (carried, x_t), *((-f.b(s) * w, m) for w, m in zip(weights, estimates, strict=True))
        )
        if self.eta > 0:
            x_s.add_(noise(x_t), alpha=s.sigma * (-math.expm1(-2 * self.eta * h)) ** 0.5)
        return State(x_s, prediction)

    def _past(self, path):
        """The visits used by this step, the newest first."""
        visits = [visit for visit in reversed(path.past) if visit.level.alpha > 0]
        lowers = self.lower_order_final
        if lowers is True or path.steps < lowers:
            return visits[: path.remaining - 1]
        return visits

    def _weights(self, k, h, levels):
        """The weights of the estimates at these levels, the newest first."""
        lags = [(a.log_snr - b.log_snr) / h for a, b in pairwise(levels)]
        if not lags:
            return [math.expm1(k)]
        if len(lags) == 1:
            slope = (math.expm1(k) / 2 if self.midpoint else phi_2(k)) / lags[0]
            return [math.expm1(k) + slope, -slope]
        # D1 = d0 + (d0 - d1) r0/(r0 + r1), D2 = 2 (d0 - d1)/(r0 + r1), d0 = (m0 - m1)/r0, d1 = (m1 - m2)/r1
        r0, r1 = lags
        curvature = 1 if self.half_curvature else 2
        bend = (phi_2(k) * r0 + curvature * phi_3(k)) / (r0 + r1)
        of_d0, of_d1 = (phi_2(k) + bend) / r0, -bend / r1
        return [math.expm1(k) + of_d0, of_d1 - of_d0, -of_d1]

"""UniPC, the unified predictor-corrector."""

import math

import torch

from .base import Sampler, State, check_order, is_endless, weighted_sum
from .exponential import form


class UniPC(Sampler):
    """UniPC of order p (Zhao et al. 2023, arXiv:2302.04867, alg. 5 and 6): predictor UniP-p, corrector UniC-p.

        x_s = (a_s/a_t) x_t - b_s (expm1(k) m_0 + B(h) sum_j rho_j (m_j - m_0)/r_j)

    in the notation of `exponential`. The evaluation at the predicted point is used by its corrector and by the next
    predictor, so a step takes one evaluation. The predictor is of order p; with the corrector, the order is p + 1. A
    state's x is the predicted point; the corrected point is the next state's `origin`.

    Args:
        order: p, 1 to 3.
        bh: the choice of B(h): 1 for h, 2 for e^h - 1 (the paper advises 1 for few unguided steps, 2 otherwise).
        plus_plus: integrate x0 instead of eps.
        lower_order_final: limit the order of a step to the number of remaining steps, including this one.
        count_clean_step: count the step to clean data among the remaining steps, as diffusers does. False gives the
            states of the authors' code, which ends at a last noisy time.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        order: int = 3,
        bh: int = 2,
        plus_plus: bool = True,
        lower_order_final: bool = True,
        count_clean_step: bool = True,
    ):
        if bh not in (1, 2):
            raise ValueError(f"bh must be 1 or 2, got {bh}")
        self.order, self.bh, self.plus_plus = check_order(order, 3), bh, plus_plus
        self.lower_order_final, self.count_clean_step = lower_order_final, count_clean_step

    @property
    def memory(self) -> int:
        return self.order

    def step(self, denoiser, x_t, t, s, noise, path):
        prediction = denoiser(x_t, t)
        f = form(self.plus_plus)
        m = f.estimate(prediction)
        past = [visit for visit in reversed(path.past) if visit.level.alpha > 0]
        remaining = path.remaining - (path.ends_clean and not self.count_clean_step)
        if past:
            order = self._order(len(past), remaining + 1)
            start, *older = past[:order]
            x_t = self._solve(start.x, start.level, f.estimate(start.prediction), t, older, (t, m))
        if is_endless(t, s):
            x_s = prediction.mix(s.alpha, s.sigma) if t.alpha == 0 else self._linear(x_t, t, m, s)
        else:
            order = self._order(len(past) + 1, remaining)
            x_s = self._solve(x_t, t, m, s, past[: order - 1])
        return State(x_s, prediction, origin=x_t)

    def _order(self, visits: int, remaining: int) -> int:
        """The order of a step, given the numbers of visits and of remaining steps, both including this one."""
        return min(self.order, visits, remaining) if self.lower_order_final else min(self.order, visits)

    def _linear(self, x_t, t, m, s):
        """The first-order step, which also reaches clean data."""
        f = form(self.plus_plus)
        ratio = f.a(s) / f.a(t)
        return weighted_sum((ratio, x_t), (f.b(s) - ratio * f.b(t), m))

    def _solve(self, x_t, t, m, s, older, at_s=None):
        """From x_t to x_s with the estimates m at t and at older visits; the corrector also uses (level, m) at s."""
        f = form(self.plus_plus)
        h = s.log_snr - t.log_snr
        others = [(visit.level, f.estimate(visit.prediction)) for visit in older]
        others += [at_s] if at_s else []
        if not others:
            return self._linear(x_t, t, m, s)
        r = [(level.log_snr - t.log_snr) / h for level, _ in others]
        weights = [weight / r_j for weight, r_j in zip(self._rho(f.k(h), r), r, strict=True)]
        scale = -f.b(s)
        terms = [(scale * weight, m_j) for weight, (_, m_j) in zip(weights, others, strict=True)]
        of_m = scale * (math.expm1(f.k(h)) - sum(weights))
        return weighted_sum((f.a(s) / f.a(t), x_t), (of_m, m), *terms)

    def _rho(self, k: float, r: list[float]) -> list[float]:
        """B(h) rho_j: exact for polynomials (eq. 9 and 10); a single rho is 1/2, as in the paper."""
        B = k if self.bh == 1 else math.expm1(k)
        if len(r) == 1:
            return [B / 2]
        moments, phi, factorial = [], math.expm1(k) / k - 1, 1.0
        for i in range(1, len(r) + 1):
            factorial *= i
            moments.append(phi * factorial)
            phi = phi / k - 1 / (factorial * (i + 1))
        powers = torch.tensor(r, dtype=torch.float64) ** torch.arange(len(r), dtype=torch.float64)[:, None]
        return torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64)).tolist()

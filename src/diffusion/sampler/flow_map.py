"""Steps of a flow map: from x_t to x_s in one evaluation of a few-step model."""

from dataclasses import replace

from ..noise_level import NoiseLevel, conditional_variance
from .base import Sampler, State, weighted_sum


class FlowMap(Sampler):
    """x_s = x_t + (s - t) u(x_t, t, s), with the average velocity of a network with a second time.

    With gamma > 0 the step first goes below s, and noise leads back up (consistency trajectory models, Kim et al. 2023,
    arXiv:2310.02279, alg. 3):

        x_r = x_t + (r - t) u(x_t, t, r),    sigma_r/alpha_r = sqrt(1 - gamma^2) sigma_s/alpha_s
        x_s = alpha_s/alpha_r x_r + gamma sigma_s z

    With gamma = 1 it goes to clean data: the multistep sampler of consistency models (Song et al. 2023,
    arXiv:2303.01469, alg. 1), which need no second time. One step is deterministic.

    Args:
        gamma: share of new noise, in [0, 1].

    Raises:
        ValueError: gamma is out of range.
    """

    def __init__(self, gamma: float = 0.0):
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {gamma}")
        self.gamma = gamma

    def check(self, second_time: bool, steps: int) -> None:
        """Raises ValueError if a network, with or without a second time, cannot make the steps."""
        if not second_time and steps > 1 and self.gamma < 1:
            raise ValueError(
                f"gamma={self.gamma:g}: this network has no second time, so that it steps to clean data only; choose"
                " sampler=consistency, sampler.steps=1, or another sampler, or train with model.second_time=true"
            )

    def step(self, denoiser, x_t, t, s, noise, path):
        self.check(denoiser.second_time, path.steps)
        r = self._below(denoiser.schedule, s)
        prediction = denoiser(x_t, t, to=r if denoiser.second_time else None)
        x = prediction.mix(r.alpha, r.sigma)
        if r is not s:
            std = conditional_variance(s, r) ** 0.5
            x = weighted_sum((s.alpha / r.alpha, x), (std, noise(x_t)))
        return State(x, prediction)

    def _below(self, schedule, s: NoiseLevel) -> NoiseLevel:
        if self.gamma == 0 or s.sigma == 0:
            return s
        if self.gamma == 1:
            (clean,) = schedule([0.0]).scalars()
            return clean
        log_snr = replace(s, sigma=(1 - self.gamma**2) ** 0.5 * s.sigma).log_snr
        (below,) = schedule(schedule.nearest_time([log_snr], 0.0)).scalars()
        return below

"""The variance of the reverse step p(x_s | x_t), s < t.

    small:          sigma_{t|s}^2 sigma_s^2 / sigma_t^2   (beta-tilde: exact if x0 is known)
    large:          sigma_{t|s}^2                         (beta: exact if x0 ~ N(0, I))
    learned_range:  interpolated between the two by the network's output
    learned:        the network's output

with sigma_{t|s}^2 = sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2 (Ho et al. 2020, sec. 3.2). The first three are defined
for any sub-sequence of times.
"""

from abc import ABC, abstractmethod

from torch import Tensor

from .noise_level import NoiseLevel, broadcast, conditional_variance
from .parameterization import Prediction
from .schedule import DiscreteSchedule, Schedule


class Variance(ABC):
    """The variance of the reverse step.

    Attributes:
        outputs: number of network output channels per image channel.
    """

    outputs = 1

    @abstractmethod
    def __call__(self, t: NoiseLevel, s: NoiseLevel, prediction: Prediction) -> Tensor | float:
        """The variance of p(x_s | x_t), with the shape of the levels, or of the images if it is learned."""

    def decoder(self, t: NoiseLevel, beta_tilde: Tensor | float, prediction: Prediction) -> Tensor | float:
        """The variance of p(x_0 | x_t), the step to clean data, for the likelihood; samplers add no noise in this step.

        Args:
            t: level of the chain's first time.
            beta_tilde: beta-tilde of the chain's second step. It replaces that of the first step, which is 0, as in
                both fixed variances of DDPM's code.
            prediction: the denoiser's prediction at t.
        """
        return beta_tilde

    def check(self, schedule: Schedule) -> None:
        """Checks that the variance fits a schedule.

        Raises:
            ValueError: the variance is learned and the schedule is not discrete.
        """
        if self.outputs > 1 and not isinstance(schedule, DiscreteSchedule):
            raise ValueError(
                "variance=learned and learned_range need the steps of a discrete schedule, got"
                f" {type(schedule).__name__}: choose variance=small or large, or e.g. schedule=cosine"
            )


class Small(Variance):
    """beta-tilde, the posterior's variance; 0 at the step to clean data."""

    def __call__(self, t, s, prediction):
        return conditional_variance(t, s) * s.sigma**2 / t.sigma**2


class Large(Variance):
    """beta. On a sub-sequence this is the sigma-hat of DDIM (Song et al. 2021, sec. 5)."""

    def __call__(self, t, s, prediction):
        return conditional_variance(t, s)


class Learned(Variance):
    """exp of the second half of the network's output: "learned" in improved DDPM's code.

    It is the variance of the training steps, t to t - 1. For sub-sequences use `LearnedRange`.
    """

    outputs = 2

    def __call__(self, t, s, prediction):
        return prediction.variance.exp()

    def decoder(self, t, beta_tilde, prediction):
        return prediction.variance.exp()


class LearnedRange(Learned):
    """beta^frac beta-tilde^(1 - frac), frac = (v + 1)/2, v the second half of the network's output.

    Improved DDPM (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15). v is not bounded.
    """

    def __call__(self, t, s, prediction):
        return self._between(Small()(t, s, prediction), conditional_variance(t, s), prediction)

    def decoder(self, t, beta_tilde, prediction):
        return self._between(beta_tilde, t.sigma**2, prediction)

    def _between(self, low: Tensor | float, high: Tensor | float, prediction: Prediction) -> Tensor:
        v = prediction.variance
        frac = (v + 1) / 2
        return broadcast(low, v) ** (1 - frac) * broadcast(high, v) ** frac

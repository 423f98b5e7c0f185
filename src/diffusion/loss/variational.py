"""The variational bound as a loss."""

from ..denoiser import Denoiser
from ..forward import diffuse
from ..likelihood import Chain
from ..time_sampling import TimeSampling
from .base import TimedLoss


class VariationalLoss(TimedLoss):
    """T L_{t-1} in bits per dimension: with uniform times the variational bound, up to its constant prior term.

    L_vlb of improved DDPM (Nichol & Dhariwal 2021, sec. 3.1), best with importance-sampled times. It also trains a
    learned variance. The weighting and the distance options do not apply.

    Args:
        denoiser: the denoiser whose network is trained.
        time_sampling: the distribution of times.

    Raises:
        ValueError: the schedule is not discrete.
    """

    def __init__(self, denoiser: Denoiser, time_sampling: TimeSampling):
        super().__init__(denoiser, time_sampling)
        self.chain = Chain(denoiser.schedule)

    def forward(self, x0, draws, eps, condition=None):
        level = self.denoiser.schedule(draws)
        prediction = self.denoiser(diffuse(x0, eps, level), level, condition)
        return len(self.chain) * self.chain.term(draws.long(), x0, prediction, self.denoiser.variance)

"""The hybrid loss of improved DDPM: the denoising loss plus the variational bound, which trains the variance."""

from ..denoiser import Denoiser
from ..distance import Distance
from ..forward import diffuse
from ..likelihood import Chain
from ..time_sampling import TimeSampling
from ..weighting import Weighting
from .denoising import DenoisingLoss


class HybridLoss(DenoisingLoss):
    """L_simple + vlb_weight L_vlb (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 16).

    L_vlb has a stop-gradient on the mean. It is T times the step's bits per dimension, as in the authors' code, so that
    it estimates the whole bound.

    Args:
        denoiser: the denoiser whose network is trained; its variance must be learned.
        weighting: weighting of the denoising loss.
        time_sampling: the distribution of times.
        distance: distance of the denoising loss (default: `Squared`).
        vlb_weight: weight of L_vlb; 0.001 in the paper.

    Raises:
        ValueError: the variance is fixed, or vlb_weight is not positive.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weighting: Weighting,
        time_sampling: TimeSampling,
        distance: Distance | None = None,
        vlb_weight: float = 0.001,
    ):
        super().__init__(denoiser, weighting, time_sampling, distance)
        if vlb_weight <= 0:
            raise ValueError(f"vlb_weight must be positive, got {vlb_weight}")
        self.vlb_weight = vlb_weight
        self.chain = Chain(denoiser.schedule)

    def check_variance(self):
        if self.denoiser.variance.outputs == 1:
            raise ValueError(
                "denoiser has a fixed variance, which loss=hybrid cannot train: choose variance=learned_range, or"
                " loss=denoising"
            )

    def forward(self, x0, draws, eps, condition=None):
        denoiser = self.denoiser
        level = denoiser.schedule(draws)
        x_t = diffuse(x0, eps, level)
        output, of_variance = denoiser.output(x_t, level, condition)
        stopped = denoiser.parameterization.predict(x_t, output.detach(), level).with_variance(of_variance)
        vlb = len(self.chain) * self.chain.term(draws.long(), x0, stopped, denoiser.variance)
        return self.weighted_error(output, x0, eps, level) + self.vlb_weight * vlb

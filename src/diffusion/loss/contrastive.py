"""Contrastive flow matching: the denoising loss minus a share of the error of another image's target."""

from ..denoiser import Denoiser
from ..distance import Distance
from ..forward import diffuse
from ..time_sampling import TimeSampling
from ..weighting import Weighting
from .denoising import DenoisingLoss


class ContrastiveLoss(DenoisingLoss):
    """Contrastive flow matching (Stoica et al. 2025, arXiv:2506.05350), for conditional training.

        loss = error(F, target) - share error(F, target of another image and its noise)

    The other image is the previous one in the batch of the device, and the target is that of this image's time. With
    the squared error, the minimum is (E[target | x_t, condition] - share E[other target]) / (1 - share): outputs of
    different conditions move apart, so that less guidance is needed. Validation has no second term.

    Args:
        denoiser: the denoiser whose network is trained; its variance must be fixed.
        weighting: weight on the error of x0, by noise level.
        time_sampling: the distribution of times.
        distance: between output and target (default: `Squared`).
        share: of the second term, in [0, 1); 0.05 in the paper.

    Raises:
        ValueError: share is out of range, or see `DenoisingLoss`.
    """

    needs_pairs = True

    def __init__(
        self,
        denoiser: Denoiser,
        weighting: Weighting,
        time_sampling: TimeSampling,
        distance: Distance | None = None,
        share: float = 0.05,
    ):
        super().__init__(denoiser, weighting, time_sampling, distance)
        if not 0 <= share < 1:
            raise ValueError(f"share must be in [0, 1), got {share}")
        self.share = share

    def forward(self, x0, draws, eps, condition=None):
        level = self.denoiser.schedule(draws)
        output, _ = self.denoiser.output(diffuse(x0, eps, level), level, condition)
        error = self.weighted_error(output, x0, eps, level)
        if not self.training:
            return error
        return error - self.share * self.weighted_error(
            output, x0.roll(1, dims=0), eps.roll(1, dims=0), level
        )

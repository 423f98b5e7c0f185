"""The two roots of the Fréchet distance, and replays of known failures of other codes."""

import numpy as np
import pytest
import torch

from src.data.codec import Pixels, TruncatedPixels
from src.errors import UserError
from src.evaluation.scores import ScoreSet
from src.metrics import frechet
from src.metrics.fidelity import FrechetDistance
from src.metrics.frechet import Moments, Target, cholesky, compare, frechet_distance
from tests.metrics.pixels import FAKE, REAL, PixelFeatures, Source, give_reference, score_of


def features(n: int, size: int, seed: int = 0) -> torch.Tensor:
    """Correlated features with standard deviations from 1 to 1e-3, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, size, generator=generator, dtype=torch.float64)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(7), dtype=torch.float64) / size
    return (x @ mixing) * torch.logspace(0, -3, size, dtype=torch.float64)


def moments(x: torch.Tensor) -> Moments:
    return Moments(x.mean(0), torch.cov(x.T))


@pytest.mark.parametrize("size", [2, 30, 200])
@pytest.mark.parametrize(("n", "m"), [(1000, 1000), (20, 1000), (1000, 20), (15, 20)])
def test_the_roots_agree_whatever_the_ranks(size, n, m):
    a, b = features(n, size, 1), features(m, size, 2) + 0.01
    found = compare(moments(a), Target.of(moments(b)))  # raises if they do not
    assert found.rank == min(size, n - 1)
    assert found.target.rank == min(size, m - 1)
    # an independent reference: the singular values of the centred features themselves
    fa, fb = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    cross = torch.linalg.svdvals(
        fa @ fb.T if n * m < 10**6 else torch.linalg.qr(fa).R @ torch.linalg.qr(fb).R.T
    )
    expected = (
        (a.mean(0) - b.mean(0)).square().sum() + fa.square().sum() + fb.square().sum() - 2 * cross.sum()
    )
    assert found.distance == pytest.approx(expected.item(), rel=1e-6)


def test_pivoted_cholesky_factors_a_singular_covariance():
    covariance = torch.cov(features(10, 30).T)
    factor = cholesky(covariance)
    assert factor.shape == (30, 9)
    torch.testing.assert_close(factor @ factor.T, covariance, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("broken", ["eigvalsh", "svdvals"])
def test_a_broken_matrix_library_is_refused(monkeypatch, broken):
    """LightningDiT, issue 97: with one build of OpenBLAS the root, and with it the FID, was wrong without an error."""
    plain = getattr(torch.linalg, broken)
    monkeypatch.setattr(torch.linalg, broken, lambda matrix: plain(matrix) * 1.001)
    with pytest.raises(
        UserError, match=r"by singular values and .* by eigenvalues, which must agree to 1e-06"
    ):
        frechet_distance(moments(features(100, 5)), moments(features(100, 5, 1)))


def test_rank_deficient_covariances_are_flagged():
    score = score_of()
    give_reference(score, REAL)
    score.update(FAKE)
    score.compute()
    assert score.warnings == []
    score.reset()
    score.update(FAKE[:4])
    score.compute()
    assert score.warnings == ["fd_pixels: the covariance of the generated images has rank 3 of 6 (4 images)"]


def test_flags_and_intervals_are_in_the_record():
    scores = ScoreSet([score_of()], intervals=True)
    scores.set_references(Source(train=REAL))
    scores.update(FAKE[:4])
    record = scores.record(scores.compute(4), {}, "")
    assert record.warnings == ["fd_pixels: the covariance of the generated images has rank 3 of 6 (4 images)"]
    low, high = record.intervals["fd_pixels"]
    assert low < record.scores["fd_pixels"] < high
    assert "95 %" in record.protocol["intervals"]


# --- replays


def test_a_covariance_along_the_wrong_axis():
    """denoising-diffusion-pytorch, issue 213: torch.cov takes variables as rows."""
    x = features(40, 6)
    with pytest.raises(ValueError, match=r"a covariance of 6 features has shape \(6, 6\), got \(40, 40\)"):
        Moments(x.mean(0), torch.cov(x))
    # with as many images as features the shapes fit: the value must be that of the right axis
    a, b = REAL[:6].flatten(1).double(), FAKE[:6].flatten(1).double()
    wrong = frechet_distance(Moments(a.mean(0), torch.cov(a)), Moments(b.mean(0), torch.cov(b)))
    score = score_of()
    give_reference(score, REAL[:6])
    score.update(FAKE[:6])
    found = score.compute()["fd_pixels"]
    assert found == pytest.approx(frechet_distance(moments(b), moments(a)), rel=1e-9)
    assert abs(found - wrong) > 0.01 * found


def test_a_root_that_others_find_complex():
    """pytorch-fid, issue 29: sqrtm of the product of singular covariances has an imaginary part."""
    from scipy.linalg import sqrtm

    a, b = features(12, 40, 1), features(15, 40, 2)
    root = sqrtm((moments(a).covariance @ moments(b).covariance).numpy())
    assert np.iscomplexobj(root)
    assert np.abs(root.imag).max() > 0
    fa, fb = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    cross = torch.linalg.svdvals(fa @ fb.T).sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + fa.square().sum() + fb.square().sum() - 2 * cross
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected.item(), rel=1e-9)


def test_images_that_are_missing_from_the_last_batch():
    """49,984 of 50,000 images: a loader that drops the last, smaller batch."""
    scores = ScoreSet([score_of()])
    scores.set_references(Source(train=REAL))
    for batch in FAKE.split(16)[:-1]:
        scores.update(batch)
    with pytest.raises(UserError, match="fd_pixels: 32 of 40 images were scored"):
        scores.compute(len(FAKE))
    scores.update(FAKE.split(16)[-1])
    scores.compute(len(FAKE))
    assert scores.protocol({}, "")["num_images"] == 40


def test_bytes_that_are_truncated():
    """Codes that cast to uint8 without rounding: half a grey level darker, and another score."""
    images = torch.rand(500, 1, 2, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rounded, truncated = (codec((1, 2, 3)).decode(images) for codec in (Pixels, TruncatedPixels))
    assert (rounded.float() - truncated.float()).mean().item() == pytest.approx(0.5, abs=0.03)
    exact = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    for codec in (Pixels, TruncatedPixels):
        x = codec((1, 16, 16)).encode(exact)
        assert (codec((1, 16, 16)).decode(x).int() - exact.int()).abs().max() <= (codec is TruncatedPixels)
    assert Pixels((1, 2, 3)).describe() != TruncatedPixels((1, 2, 3)).describe()
    score = FrechetDistance(PixelFeatures(6))
    give_reference(score, rounded)
    score.update(rounded)
    assert score.compute()["fd_pixels"] == pytest.approx(0, abs=1e-6)
    score.reset()
    score.update(truncated)
    assert score.compute()["fd_pixels"] == pytest.approx(6 * 0.25, rel=0.1)


def test_agreement_is_relative_to_the_distance():
    assert frechet.AGREEMENT == 1e-6
    frechet._check(1.0, 1.0 + 9e-7, 1.0)
    with pytest.raises(UserError):
        frechet._check(1.0, 1.0 + 1.1e-6, 1.0)
    with pytest.raises(UserError):
        frechet._check(1.0, float("nan"), 1.0)

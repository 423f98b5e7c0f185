import math

import pytest
import torch
from torch import Tensor

from src.errors import UserError
from src.metrics.features import ClassifierFeatures
from src.metrics.fidelity import Accuracy, FrechetDistance, InceptionScore, KernelDistance, PrecisionRecall
from src.metrics.frechet import Moments, frechet_distance
from src.metrics.score import Reference
from tests.metrics.pixels import FAKE, REAL, PixelFeatures, give_reference, score_of

# --- the Frechet distance


def test_distance_in_one_dimension():
    a = Moments(torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double())
    b = Moments(torch.tensor([4.0]).double(), torch.tensor([[25.0]]).double())
    assert frechet_distance(a, b) == pytest.approx((4 - 1) ** 2 + (5 - 2) ** 2, rel=1e-12)


def test_distance_of_covariances_with_common_axes():
    # (sum of squared differences of means) + (of standard deviations), in any rotated basis
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    means = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    deviations = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    a, b = (Moments(m, basis @ torch.diag(s**2) @ basis.T) for m, s in zip(means, deviations, strict=True))
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-12)


def test_distance_of_covariances_that_do_not_commute():
    # tr (A B)^(1/2) of 2 x 2 matrices is (tr AB + 2 sqrt(det AB))^(1/2), by Cayley and Hamilton
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.5], [-0.5, 4.0]], dtype=torch.float64)
    cross = math.sqrt(torch.trace(a @ b) + 2 * math.sqrt(torch.det(a @ b)))
    expected = (torch.trace(a) + torch.trace(b)).item() - 2 * cross
    mean = torch.zeros(2, dtype=torch.float64)
    assert frechet_distance(Moments(mean, a), Moments(mean, b)) == pytest.approx(expected, rel=1e-12)


def test_distance_of_singular_covariances():
    # s uu^T and t vv^T of rank one: the cross term is sqrt(st) |u.v|
    u, v = torch.tensor([3.0, 4.0]).double() / 5, torch.tensor([1.0, 0.0]).double()
    mean = torch.zeros(2, dtype=torch.float64)
    a, b = Moments(mean, 4 * torch.outer(u, u)), Moments(mean, 9 * torch.outer(v, v))
    assert frechet_distance(a, b) == pytest.approx(4 + 9 - 2 * 6 * 0.6, rel=1e-7)


def test_moments_are_those_of_the_images():
    features = REAL.flatten(1).double()
    gaussian = Moments.of_sums(torch.tensor(50), features.sum(0), features.T @ features)
    torch.testing.assert_close(gaussian.mean, features.mean(0))
    torch.testing.assert_close(gaussian.covariance, torch.cov(features.T))


# --- scores


def fd(images: list[Tensor], score: FrechetDistance) -> float:
    score.reset()
    for batch in images:
        score.update(batch)
    return score.compute()["fd_pixels"]


def test_distance_is_zero_for_identical_sets_and_agrees_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    score = score_of()
    give_reference(score, REAL)
    scale = REAL.double().var(0).sum().item()
    assert abs(fd([REAL], score)) < 1e-10 * scale
    theirs = FrechetInceptionDistance(PixelFeatures(6))
    theirs.update(REAL, real=True)
    theirs.update(FAKE, real=False)
    assert fd([FAKE], score) == pytest.approx(theirs.compute().item(), rel=1e-6)
    assert score.num_images == 40


def test_distance_does_not_depend_on_batches_or_order():
    score = score_of()
    give_reference(score, *REAL.split(7))
    whole = fd([FAKE], score)
    assert fd(list(FAKE.flip(0).split(9)), score) == pytest.approx(whole, rel=1e-12)


def test_reset_drops_the_generated_images_and_keeps_the_reference():
    score = score_of()
    give_reference(score, REAL)
    first = fd([FAKE], score)
    assert fd([REAL], score) != pytest.approx(first)
    assert fd([FAKE], score) == first


def test_score_in_digits_space_increases_with_the_difference():
    from src.data.digits import Digits

    score = FrechetDistance(ClassifierFeatures("digits"))
    train_set = Digits().split("train")
    everything = train_set.images(torch.arange(len(train_set)))
    give_reference(score, *everything.split(256))
    noise = torch.randn(everything.shape, generator=torch.Generator().manual_seed(0))
    values = []
    for strength in (0, 16, 64, 256):
        score.reset()
        score.update((everything + strength * noise).round().clamp(0, 255).byte())
        values.append(score.compute()["fd_digits"])
    assert abs(values[0]) < 1e-9
    assert values == sorted(values)
    assert values[3] > 20 * values[1]


def test_names_contain_the_feature_space():
    inception, logits = PixelFeatures(6), PixelFeatures(6)
    inception.name, logits.name = "inception", "inception_logits_unbiased"
    assert FrechetDistance(inception).name == "fid"
    assert KernelDistance(inception, 1000).name == "kid"
    assert FrechetDistance(logits).name == "fd_inception_logits_unbiased"
    assert score_of().name == "fd_pixels"
    assert score_of(KernelDistance, subset_size=2).name == "kd_pixels"
    assert score_of(PrecisionRecall).name == "precision_pixels"
    assert InceptionScore(logits).name == "inception_score"
    with pytest.raises(ValueError, match="logits_unbiased"):
        InceptionScore(inception)


def test_kernel_distance_equals_its_formula():
    # with subsets as large as the sets, the estimate is the unbiased one of Gretton et al. 2012, eq. 3
    fake = FAKE[:30]
    real = REAL[:30]
    score = score_of(KernelDistance, subsets=2, subset_size=30)
    give_reference(score, real)
    score.update(fake)
    x, y = fake.flatten(1).double(), real.flatten(1).double()

    def kernel(a, b):
        return (a @ b.T / 6 + 1) ** 3

    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    expected = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (30 * 29) - 2 * xy.mean()
    scores = score.compute()
    assert scores["kd_pixels"] == pytest.approx(expected.item(), rel=1e-9)
    assert scores["kd_pixels_std"] == pytest.approx(0, abs=1e-9 * expected.item())


def test_kernel_distance_does_not_depend_on_batches_or_the_global_random_state():
    score = score_of(KernelDistance, subsets=5, subset_size=10)
    give_reference(score, REAL)
    values = []
    for seed, size in ((0, len(FAKE)), (1, 7)):
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        score.reset()
        for images in FAKE.split(size):
            score.update(images)
        values.append(score.compute())
        assert torch.equal(torch.random.get_rng_state(), state)
    assert values[0] == values[1]
    assert values[0]["kd_pixels_std"] > 0


def test_precision_and_recall_of_partly_overlapping_sets():
    # on a line: reference 0, 10, ..., 90; generated 0, ..., 40 coincide with it, the rest is far away
    real = (torch.arange(10) * 10).byte().reshape(-1, 1, 1, 1)
    fake = torch.tensor([0, 10, 20, 30, 40, 200, 210, 220, 230, 240]).byte().reshape(-1, 1, 1, 1)
    score = PrecisionRecall(PixelFeatures(1), neighbours=1)
    give_reference(score, real)
    score.update(fake)
    scores = score.compute()
    assert scores["precision_pixels"] == pytest.approx(0.5)
    # each generated image has radius 10, which covers 0, ..., 40 and, from 40, 50
    assert scores["recall_pixels"] == pytest.approx(0.6)


def test_inception_score_of_certain_and_uniform_predictions():
    def score(logits: Tensor) -> float:
        features = PixelFeatures(4, scale=1.0)
        features.name = "inception_logits_unbiased"
        metric = InceptionScore(features, splits=1)
        metric.update(logits.byte().reshape(-1, 1, 2, 2))
        return metric.compute()["inception_score"]

    # four classes predicted with certainty and equally often: exp(log 4); equal predictions for all images: exp(0)
    assert score(200 * torch.eye(4).repeat(5, 1)) == pytest.approx(4, rel=1e-6)
    assert score(torch.zeros(20, 4)) == pytest.approx(1, rel=1e-6)


def test_accuracy_is_the_share_of_images_of_the_given_class():
    from src.data.digits import Digits

    digits = Digits().split("test")
    images, labels = digits.images(range(140)), digits.labels[:140]
    score = Accuracy(ClassifierFeatures("digits"))
    for wrong in (0, 35, 140):  # the classifier is right about all test images
        given = labels.clone()
        given[:wrong] = (given[:wrong] + 1) % 10
        score.reset()
        for part in range(0, 140, 50):
            score.update(images[part : part + 50], labels=given[part : part + 50])
        assert score.compute() == {"accuracy_digits": 1 - wrong / 140}


# --- errors


def test_missing_reference_and_too_few_images_are_user_errors():
    score = score_of()
    score.update(FAKE)
    with pytest.raises(UserError, match="fd_pixels: no reference"):
        score.compute()
    give_reference(score, REAL)
    score.update(FAKE[:1])
    with pytest.raises(UserError, match="fd_pixels needs at least 2 images, but the generated set has 1"):
        score.compute()
    small = score_of(KernelDistance, subset_size=45)
    give_reference(small, REAL)
    small.update(FAKE)
    with pytest.raises(UserError, match=r"at least 45 images \(subset_size=45\), but .* has 40"):
        small.compute()


@pytest.mark.parametrize(
    ("kind", "settings", "smallest"),
    [
        (FrechetDistance, {}, 2),
        (KernelDistance, {"subset_size": 9}, 9),
        (PrecisionRecall, {"neighbours": 4}, 5),
    ],
)
def test_scores_of_the_smallest_accepted_sets_are_finite(kind, settings, smallest):
    score = score_of(kind, **settings)
    give_reference(score, REAL[:smallest])
    score.update(FAKE[:smallest])
    assert math.isfinite(score.compute()[score.name])
    score.check_count(smallest, "the set")
    with pytest.raises(UserError, match=f"at least {smallest} images"):
        score.check_count(smallest - 1, "the set")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (KernelDistance, {"subset_size": 1}),
        (KernelDistance, {"subset_size": 2, "subsets": 0}),
        (PrecisionRecall, {"neighbours": 0}),
    ],
)
def test_invalid_arguments_are_refused(kind, settings):
    with pytest.raises(ValueError, match=f"^{list(settings)[-1]} must be at least"):
        score_of(kind, **settings)


@pytest.mark.parametrize(("kind", "settings"), [(FrechetDistance, {}), (KernelDistance, {"subset_size": 20})])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_error_names_features_that_are_not_finite(kind, settings, bad):
    score = score_of(kind, **settings)
    give_reference(score, REAL)
    score.features.scale = bad
    score.update(FAKE)
    with pytest.raises(UserError, match="features 'pixels' of the generated set are not finite"):
        score.compute()
    with pytest.raises(UserError, match="features 'pixels' of the reference are not finite"):
        give_reference(score, REAL)


def test_a_wrong_reference_is_refused():
    score = score_of()
    score.update(REAL)
    states = score.states("the reference")
    with pytest.raises(ValueError, match="split 'test', fd_pixels uses 'train'"):
        score.set_reference(Reference("noise", "test", 50, "abc"), states)
    with pytest.raises(ValueError, match="reference has 49 images, but fd_pixels saw 50"):
        score.set_reference(Reference("noise", "train", 49, "abc"), states)
    assert score.reference is None

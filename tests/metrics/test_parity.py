"""Each score against torch-fidelity's own call on the same images, from images to number."""

import pytest
import torch
import torch_fidelity
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from src.evaluation.scores import ScoreSet
from src.metrics.features import InceptionFeatures
from src.metrics.fidelity import FrechetDistance, InceptionScore, KernelDistance, PrecisionRecall
from src.metrics.neighbours import DensityCoverage
from src.metrics.score import FidelityScore
from tests.metrics.pixels import PixelFeatures, give_reference
from tests.metrics.test_features import random_images
from tests.metrics.test_inception import Dataset


class Float64Inception(FeatureExtractorInceptionV3):
    """torch-fidelity's, with features in float64, since it computes kernels in their precision."""

    def forward(self, x):
        return tuple(each.double() for each in super().forward(x))


class PixelExtractor(FeatureExtractorBase):
    """The pixels as features, for torch-fidelity; in float64, since it computes kernels in the features' precision."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        self.register_buffer("none", torch.zeros(1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (images[:, :1].flatten(1).double() / 64,)

    @staticmethod
    def get_provided_features_list():
        return ("pixels",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "pixels"

    @staticmethod
    def can_be_compiled():
        return False

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.zeros(1, 3, 2, 2, dtype=torch.uint8)


torch_fidelity.register_feature_extractor("pixels-of-the-tests", PixelExtractor)
torch_fidelity.register_feature_extractor("inception-in-float64", Float64Inception)
REAL = random_images(90, (1, 3, 3), seed=1)
FAKE = random_images(80, (1, 3, 3), seed=2)
FAKE[::2] = FAKE[::2] // 128 * 255  # in the corners, where few of the real ones are


def theirs(fake: Tensor, real: Tensor, **settings) -> dict[str, float]:
    return torch_fidelity.calculate_metrics(
        input1=Dataset(fake.expand(-1, 3, -1, -1)),
        input2=Dataset(real.expand(-1, 3, -1, -1)),
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
        **settings,
    )


def ours(score: FidelityScore, fake: Tensor, real: Tensor) -> dict[str, float]:
    if score.needs_reference:
        give_reference(score, *real.split(32))
    for batch in fake.split(30):
        score.update(batch)
    return score.compute()


def check_all(features, found: dict[str, float], fake: Tensor, real: Tensor) -> None:
    """Compares the scores, KID with the same number and size of subsets."""
    assert ours(FrechetDistance(features), fake, real)[FrechetDistance(features).name] == pytest.approx(
        found["frechet_inception_distance"], rel=1e-6
    )
    kernel = KernelDistance(features, **SUBSETS)
    mean, deviation = ours(kernel, fake, real).values()
    assert mean == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-6)
    # between subsets; rounding of InceptionV3's features changes it by 3e-6
    assert deviation == pytest.approx(found["kernel_inception_distance_std"], rel=1e-5)
    neighbours = PrecisionRecall(features)
    assert list(ours(neighbours, fake, real).values()) == pytest.approx(
        [found["precision"], found["recall"]], abs=1e-12
    )


def everything(fake: Tensor, real: Tensor, **settings) -> dict[str, float]:
    kernel = {f"kid_{name}": value for name, value in SUBSETS.items()}
    return theirs(fake, real, fid=True, prc=True, kid=True, **kernel, **settings)


SUBSETS = {"subsets": 4, "subset_size": 30}


def test_scores_equal_torch_fidelitys_call():
    found = everything(FAKE, REAL, feature_extractor="pixels-of-the-tests")
    assert 0 < found["precision"] < 1
    assert found["recall"] > 0
    check_all(PixelFeatures(9, scale=1 / 64), found, FAKE, REAL)
    score = theirs(FAKE, REAL, isc=True, feature_extractor="pixels-of-the-tests")
    logits = PixelFeatures(9, scale=1 / 64)
    logits.name = "inception_logits_unbiased"
    assert list(ours(InceptionScore(logits), FAKE, REAL).values()) == pytest.approx(
        [score["inception_score_mean"], score["inception_score_std"]], rel=1e-6
    )


@pytest.mark.slow
def test_scores_of_inception_equal_torch_fidelitys_call(state_dict_file):
    real, fake = random_images(50, (3, 32, 32), seed=1), random_images(40, (3, 32, 32), seed=2) // 2
    weights = {"feature_extractor_weights_path": str(state_dict_file)}
    found = everything(fake, real, feature_extractor="inception-in-float64", **weights)
    check_all(InceptionFeatures(str(state_dict_file)), found, fake, real)
    their = theirs(fake, real, isc=True, **weights)
    score = InceptionScore(InceptionFeatures(str(state_dict_file), "logits_unbiased"))
    assert ours(score, fake, real)["inception_score"] == pytest.approx(
        their["inception_score_mean"], rel=1e-6
    )


def test_fid_and_inception_score_share_one_pass(state_dict_file, monkeypatch):
    body = InceptionFeatures(str(state_dict_file))
    logits = InceptionFeatures(str(state_dict_file), "logits_unbiased")
    assert logits.base == (body.name, body.sha256)
    images = random_images(2, (3, 20, 20))
    torch.testing.assert_close(logits.from_base(body(images)), logits(images), rtol=1e-5, atol=1e-6)
    scores = ScoreSet([InceptionScore(logits, splits=1), FrechetDistance(body)])
    calls = []
    for network in (body, logits):
        monkeypatch.setattr(
            network,
            "extract",
            lambda images, of=network, plain=network.extract: calls.append(of) or plain(images),
        )
    scores.update(images)
    assert calls == [body]


# --- ground truth


def known_gaussians(n: int, seed: int, mean: float, deviation: float) -> Tensor:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)) * deviation + mean
    return x.round().clamp(0, 255).byte().reshape(n, 1, 2, 2)


def test_two_gaussians_with_known_moments():
    real, fake = known_gaussians(40_000, 0, 120, 10), known_gaussians(40_000, 1, 125, 15)
    # 4 ((125 - 120)^2 + (15 - 10)^2), and rounding adds 1/12 to each variance
    expected = 4 * (25 + ((225 + 1 / 12) ** 0.5 - (100 + 1 / 12) ** 0.5) ** 2)
    score = FrechetDistance(PixelFeatures(4))
    score.with_intervals = True
    found = ours(score, fake, real)["fd_pixels"]
    low, high = score.intervals["fd_pixels"]
    assert low - 1 < expected < high + 1
    assert found == pytest.approx(expected, rel=0.02)


def test_a_data_set_with_itself():
    features = PixelFeatures(9, scale=1 / 64)
    assert ours(FrechetDistance(features), REAL, REAL)["fd_pixels"] == pytest.approx(0, abs=1e-7)
    assert ours(PrecisionRecall(features), REAL, REAL) == {"precision_pixels": 1, "recall_pixels": 1}
    # each image lies in its own ball and in those of which it is one of the first k - 1 neighbours
    assert ours(DensityCoverage(features), REAL, REAL) == pytest.approx(
        {"density_pixels": 1, "coverage_pixels": 1}
    )


def test_the_kernel_distance_is_unbiased_at_zero():
    score = KernelDistance(PixelFeatures(4, scale=0.05), subset_size=60, subsets=5)
    values = []
    for seed in range(30):
        score.reset()
        values.append(
            ours(score, known_gaussians(100, 2 * seed, 120, 15), known_gaussians(100, 2 * seed + 1, 120, 15))
        )
    values = torch.tensor([value["kd_pixels"] for value in values])
    assert (values < 0).any()
    assert abs(values.mean()) < 3 * values.std() / len(values) ** 0.5


def test_density_and_coverage_of_partly_overlapping_sets():
    # on a line, k = 1: real 0, 10, ..., 90 have open balls of radius 10; fake 4, 5, 6 and one far away
    real = (torch.arange(10) * 10).byte().reshape(-1, 1, 1, 1)
    fake = torch.tensor([4, 5, 6, 200]).byte().reshape(-1, 1, 1, 1)
    found = ours(DensityCoverage(PixelFeatures(1), neighbours=1), fake, real)
    # each of the three lies in the balls of 0 and 10; these two of ten balls hold an image
    assert found == pytest.approx({"density_pixels": 6 / 4, "coverage_pixels": 0.2})


def test_the_extrapolated_distance_of_a_perfect_generator_is_zero():
    from src.metrics.infinity import FrechetInfinity

    features = PixelFeatures(4)
    real = known_gaussians(30_000, 0, 120, 15)
    plain, infinite = [], []
    for seed in range(30):
        fake = known_gaussians(3_000, seed + 1, 120, 15)
        plain.append(ours(FrechetDistance(features), fake, real)["fd_pixels"])
        infinite.append(ours(FrechetInfinity(features, points=8), fake, real)["fd_pixels_infinity"])
    plain, infinite = torch.tensor(plain), torch.tensor(infinite)
    assert plain.mean() > 10 * plain.std() / 30**0.5  # biased
    assert abs(infinite.mean()) < 3 * infinite.std() / 30**0.5
    assert abs(infinite.mean()) < 0.5 * plain.mean()

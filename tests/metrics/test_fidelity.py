import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from src.errors import UserError
from src.evaluation.record import Protocol, Recipe
from src.metrics.features import ClassifierFeatures, FeatureExtractor
from src.metrics.fidelity import (
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    Moments,
    PrecisionRecall,
    Reference,
    frechet_distance,
    shares,
)
from tests.metrics.test_features import random_images


class PixelFeatures(FeatureExtractor):
    """The pixels themselves: images with known moments are features with known moments."""

    def __init__(self, pixels: int, scale: float = 1.0, sha256: str = "pixels"):
        super().__init__("pixels", pixels, sha256, "the pixels themselves")
        self.scale = scale

    def extract(self, images: Tensor) -> Tensor:
        return images.flatten(1) * self.scale


class Images:
    def __init__(self, pixels: Tensor):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices: Tensor) -> Tensor:
        return self.pixels[indices]


def reference_of(images: Tensor, fingerprint: str = "abc") -> Reference:
    return Reference("noise", "train", len(images), fingerprint)


def score_of(kind=FrechetDistance, pixels: int = 6, **settings):
    return kind(PixelFeatures(pixels), **settings)


REAL = random_images(50, (1, 2, 3), seed=1)
FAKE = random_images(40, (1, 2, 3), seed=2) // 2


# --- the distance itself


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


def test_singular_covariances_are_no_special_case():
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


# --- scores as the callback and the command use them


def fd(images: list[Tensor], score: FrechetDistance) -> float:
    score.reset()
    for batch in images:
        score.update(batch)
    return score.compute()["fd_pixels"]


def test_identical_sets_are_at_distance_zero_and_others_as_torchmetrics_says():
    from torchmetrics.image.fid import FrechetInceptionDistance

    score = score_of()
    score.set_reference([REAL], reference_of(REAL))
    scale = REAL.double().var(0).sum().item()
    assert abs(fd([REAL], score)) < 1e-10 * scale
    theirs = FrechetInceptionDistance(PixelFeatures(6))
    theirs.update(REAL, real=True)
    theirs.update(FAKE, real=False)
    assert fd([FAKE], score) == pytest.approx(theirs.compute().item(), rel=1e-6)
    assert score.num_images == 40


def test_neither_batches_nor_their_order_matter():
    score = score_of()
    score.set_reference(REAL.split(7), reference_of(REAL))
    whole = fd([FAKE], score)
    assert fd(list(FAKE.flip(0).split(9)), score) == pytest.approx(whole, rel=1e-12)


def test_reset_forgets_the_generated_images_and_keeps_the_reference():
    score = score_of()
    score.set_reference([REAL], reference_of(REAL))
    first = fd([FAKE], score)
    assert fd([REAL], score) != pytest.approx(first)
    assert fd([FAKE], score) == first


def test_setting_the_reference_drops_generated_images():
    score = score_of()
    score.set_reference([REAL], reference_of(REAL))
    clean = fd([FAKE], score)
    score.reset()
    score.update(REAL)
    score.set_reference([REAL], reference_of(REAL))
    score.update(FAKE)
    assert score.compute()["fd_pixels"] == clean


def test_a_larger_difference_scores_worse_in_digits():
    from src.data.digits import Digits

    score = FrechetDistance(ClassifierFeatures("digits"))
    train_set = Digits().split("train")
    everything = train_set.images(torch.arange(len(train_set)))
    score.set_reference(shares(train_set, 256), reference_of(everything))
    noise = torch.randn(everything.shape, generator=torch.Generator().manual_seed(0))
    values = []
    for strength in (0, 16, 64, 256):
        score.reset()
        score.update((everything + strength * noise).round().clamp(0, 255).byte())
        values.append(score.compute()["fd_digits"])
    assert abs(values[0]) < 1e-9
    assert values == sorted(values)
    assert values[3] > 20 * values[1]


def test_names_say_the_space():
    inception, logits = PixelFeatures(6), PixelFeatures(6)
    inception.name, logits.name = "inception", "inception_logits_unbiased"
    assert FrechetDistance(inception).name == "fid"
    assert KernelDistance(inception).name == "kid"
    assert FrechetDistance(logits).name == "fd_inception_logits_unbiased"
    assert score_of().name == "fd_pixels"
    assert score_of(KernelDistance).name == "kd_pixels"
    assert score_of(PrecisionRecall).name == "precision_pixels"
    assert InceptionScore(logits).name == "inception_score"
    with pytest.raises(ValueError, match="logits_unbiased"):
        InceptionScore(inception)


def test_kernel_distance_by_hand():
    # subsets as large as the sets: the unbiased estimate of Gretton et al. 2012, eq. 3, no draw left
    fake = FAKE[:30]
    real = REAL[:30]
    score = score_of(KernelDistance, subsets=2, subset_size=30)
    score.set_reference([real], reference_of(real))
    score.update(fake)
    x, y = fake.flatten(1).double(), real.flatten(1).double()

    def kernel(a, b):
        return (a @ b.T / 6 + 1) ** 3

    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    expected = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (30 * 29) - 2 * xy.mean()
    scores = score.compute()
    assert scores["kd_pixels"] == pytest.approx(expected.item(), rel=1e-9)
    assert scores["kd_pixels_std"] == pytest.approx(0, abs=1e-9 * expected.item())


def test_kernel_distance_does_not_depend_on_the_order_of_the_images_or_the_global_random_state():
    score = score_of(KernelDistance, subsets=5, subset_size=10)
    score.set_reference([REAL], reference_of(REAL))
    values = []
    for seed, images in ((0, FAKE), (1, FAKE.flip(0))):
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        score.reset()
        score.update(images)
        values.append(score.compute())
        assert torch.equal(torch.random.get_rng_state(), state)
    assert values[0] == values[1]
    assert values[0]["kd_pixels_std"] > 0


def test_precision_and_recall_of_sets_that_overlap_in_part():
    # on a line: reference 0, 10, ..., 90; generated 0..40 lie on it, the rest is far away
    real = (torch.arange(10) * 10).byte().reshape(-1, 1, 1, 1)
    fake = torch.tensor([0, 10, 20, 30, 40, 200, 210, 220, 230, 240]).byte().reshape(-1, 1, 1, 1)
    score = PrecisionRecall(PixelFeatures(1), neighbours=1)
    score.set_reference([real], reference_of(real))
    score.update(fake)
    scores = score.compute()
    assert scores["precision_pixels"] == pytest.approx(0.5)
    # each generated image reaches 10 far: 0..40 and, from 40, 50
    assert scores["recall_pixels"] == pytest.approx(0.6)


def test_inception_score_of_certain_and_of_uncertain_predictions():
    def score(logits: Tensor) -> float:
        features = PixelFeatures(4, scale=1.0)
        features.name = "inception_logits_unbiased"
        metric = InceptionScore(features, splits=1)
        metric.update(logits.byte().reshape(-1, 1, 2, 2))
        return metric.compute()["inception_score"]

    # four classes, each predicted with certainty and equally often: exp(log 4); one for all: exp(0)
    assert score(200 * torch.eye(4).repeat(5, 1)) == pytest.approx(4, rel=1e-6)
    assert score(torch.zeros(20, 4)) == pytest.approx(1, rel=1e-6)


# --- what can go wrong


def test_no_reference_and_too_few_images_are_told():
    score = score_of()
    score.update(FAKE)
    with pytest.raises(UserError, match="fd_pixels: no reference"):
        score.compute()
    score.set_reference([REAL], reference_of(REAL))
    score.update(FAKE[:1])
    with pytest.raises(UserError, match="at least 2 images, not 1"):
        score.compute()
    small = score_of(KernelDistance, subset_size=45)
    small.set_reference([REAL], reference_of(REAL))
    small.update(FAKE)
    with pytest.raises(UserError, match=r"metrics\.subset_size=45: kd_pixels has only 40 images"):
        small.compute()


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_an_error_that_names_them(kind, bad):
    score = score_of(kind)
    score.set_reference([REAL], reference_of(REAL))
    score.features.scale = bad
    score.update(FAKE)
    with pytest.raises(UserError, match="generated images: features of 'pixels' are not finite"):
        score.compute()
    with pytest.raises(UserError, match="reference: features of 'pixels' are not finite"):
        score.set_reference([REAL], reference_of(REAL))


def test_a_wrong_reference_is_refused():
    score = score_of()
    with pytest.raises(ValueError, match="split 'train', not 'test'"):
        score.set_reference([REAL], Reference("noise", "test", 50, "abc"))
    with pytest.raises(ValueError, match="said to have 49 images, but 50 came"):
        score.set_reference([REAL], Reference("noise", "train", 49, "abc"))
    assert score.reference is None


# --- the cache


def never():
    raise AssertionError("the reference was read although it is cached")
    yield


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance])
def test_cached_reference_gives_the_same_score_without_reading_images(tmp_path, kind):
    settings = {"subset_size": 20} if kind is KernelDistance else {}
    first, second = score_of(kind, **settings), score_of(kind, **settings)
    first.set_reference([REAL], reference_of(REAL), tmp_path)
    second.set_reference(never(), reference_of(REAL), tmp_path)
    first.update(FAKE)
    second.update(FAKE)
    assert first.compute() == second.compute()


def test_other_data_other_weights_and_other_counts_miss_the_cache(tmp_path):
    score_of().set_reference([REAL], reference_of(REAL), tmp_path)
    other_weights = FrechetDistance(PixelFeatures(6, sha256="other"))
    for score, reference in [
        (score_of(), reference_of(REAL, fingerprint="changed")),
        (score_of(), Reference("noise", "train", 49, "abc")),
        (score_of(), Reference("other", "train", 50, "abc")),
        (score_of(reference_split="test"), Reference("noise", "test", 50, "abc")),
        (other_weights, reference_of(REAL)),
        (score_of(KernelDistance), reference_of(REAL)),
    ]:
        with pytest.raises(AssertionError, match="although it is cached"):
            score.set_reference(never(), reference, tmp_path)


def test_a_cache_file_with_another_key_or_damaged_is_computed_anew(tmp_path):
    score = score_of()
    score.set_reference([REAL], reference_of(REAL), tmp_path)
    expected = fd([FAKE], score)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    renamed = content.replace(b'\\"fingerprint\\": \\"abc\\"', b'\\"fingerprint\\": \\"xyz\\"')
    assert renamed != content
    for damaged in (content[:-20], b"", renamed):
        path.write_bytes(damaged)
        fresh = score_of()
        fresh.set_reference([REAL], reference_of(REAL), tmp_path)
        assert fd([FAKE], fresh) == expected
        assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# --- several processes


def test_shares_cover_every_image_once():
    for world_size in (1, 2, 3, 60):
        dealt = [b for rank in range(world_size) for b in shares(Images(REAL), 4, rank, world_size)]
        assert all(len(batch) <= 4 for batch in dealt)
        found = sorted(map(tuple, torch.cat(dealt).flatten(1).tolist()))
        assert found == sorted(map(tuple, REAL.flatten(1).tolist()))


def scores_of_rank(rank: int, world_size: int, cache_dir: Path) -> dict[str, float]:
    scores = {}
    for kind, settings in ((FrechetDistance, {}), (KernelDistance, {"subset_size": 20, "subsets": 5})):
        score = score_of(kind, **settings)
        score.set_reference(shares(Images(REAL), 8, rank, world_size), reference_of(REAL), cache_dir)
        for batch in shares(Images(FAKE), 7, rank, world_size):
            score.update(batch)
        scores |= score.compute()
        assert score.num_images == len(FAKE)
        # one rank has nothing to score
        score.reset()
        if rank == 0:
            score.update(FAKE)
        scores |= {f"rank 0 only, {name}": value for name, value in score.compute().items()}
    return scores


def one_process(rank: int, world_size: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    scores = [scores_of_rank(rank, world_size, folder / "cache") for _ in range(2)]
    doubled = score_of()
    try:
        doubled.set_reference([REAL], reference_of(REAL))
        complaint = ""
    except ValueError as error:
        complaint = str(error)
    (folder / f"{rank}.json").write_text(json.dumps([*scores, complaint]))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_scores_of_one(tmp_path):
    torch.multiprocessing.spawn(one_process, args=(2, tmp_path), nprocs=2)
    expected = scores_of_rank(0, 1, tmp_path / "alone")
    for rank in range(2):
        fresh, cached, complaint = json.loads((tmp_path / f"{rank}.json").read_text())
        assert fresh == pytest.approx(expected, rel=1e-12)
        assert cached == pytest.approx(expected, rel=1e-12)
        # a reference read in full by each rank would count twice
        assert "said to have 50 images, but 100 came from 2 ranks" in complaint
    written = {file.name for file in (tmp_path / "cache").iterdir()}
    assert written == {file.name for file in (tmp_path / "alone").iterdir()}


# --- the protocol


def test_protocol_tells_everything_and_is_json():
    score = score_of(KernelDistance, subsets=3, subset_size=20)
    score.set_reference([REAL], reference_of(REAL))
    score.update(FAKE)
    score.compute()
    recipe = Recipe(
        training_steps=500,
        weights="ema",
        ema_decay=0.999,
        sampler="DDIM(eta=0.0)",
        spacing="Uniform()",
        variance="Small()",
        guidance="none",
        clipping="none",
        labels="none",
        steps=50,
        network_evaluations=50,
        seed=7,
    )
    record = json.loads(json.dumps(Protocol.of(score, recipe).as_dict()))
    assert record["num_images"] == 40
    assert record["reference"] == {"data": "noise", "split": "train", "count": 50, "fingerprint": "abc"}
    assert record["features"] == {
        "name": "pixels",
        "num_features": 6,
        "sha256": "pixels",
        "origin": "the pixels themselves",
    }
    assert record["settings"] == {"kernel": "(x.y/d + 1)^3", "subsets": 3, "subset_size": 20, "seed": 2020}
    assert record["recipe"]["ema_decay"] == 0.999
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(record["versions"]) == {"torch", "torchmetrics", "torch-fidelity"}

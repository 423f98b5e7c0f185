import json
from pathlib import Path

import pytest
import torch

from src.errors import UserError
from src.evaluation.reference import share_of
from src.evaluation.scores import ScoreSet
from src.metrics.fidelity import FrechetDistance, KernelDistance, PrecisionRecall
from tests.metrics.pixels import FAKE, REAL, Images, PixelFeatures, Source, give_reference, score_of

KD = {"subset_size": 15, "subsets": 5}


def both() -> ScoreSet:
    """Two scores in one feature space, each with a separate feature network."""
    return ScoreSet([score_of(), score_of(KernelDistance, **KD)])


def scored(scores: ScoreSet, *batches: torch.Tensor) -> dict[str, float]:
    scores.reset()
    for batch in batches:
        scores.update(batch)
    return scores.compute()


def test_scores_computed_together_equal_separate_scores_bit_for_bit(tmp_path):
    together = both()
    together.set_references(Source(train=REAL))
    found = scored(together, *FAKE.split(7))
    assert list(found) == ["fd_pixels", "kd_pixels", "kd_pixels_std"]
    for kind, settings in ((FrechetDistance, {}), (KernelDistance, KD)):
        alone = score_of(kind, **settings)
        give_reference(alone, REAL)
        for batch in FAKE.split(7):
            alone.update(batch)
        for name, value in alone.compute().items():
            assert found[name] == value


def test_draws_follow_the_numbers_of_the_images(tmp_path):
    scores = ScoreSet(both().scores, num_classes=2)
    for score in scores.of_classes:
        score.smallest = 2
    source = Source(train=REAL)
    source.sets["train"].labels = torch.arange(50) % 2
    scores.set_references(source)
    labels, found = torch.arange(40) // 3 % 2, []
    for places in (torch.arange(40), torch.randperm(40, generator=torch.Generator().manual_seed(0))):
        scores.reset()
        for chosen in places.split(9):
            scores.update(FAKE[chosen], labels[chosen], chosen.tolist())
        found.append(scores.compute())
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    scores.reset()
    scores.update(FAKE, labels)
    assert scores.compute() == pytest.approx(found[0], rel=1e-12)
    scores.reset()
    scores.update(FAKE.flip(0), labels.flip(0))
    assert scores.compute()["kd_pixels"] != pytest.approx(found[0]["kd_pixels"], rel=1e-6), "other draws"


def test_each_feature_space_is_computed_once_per_batch():
    other = PixelFeatures(6, scale=2, sha256="other")
    other.name = "doubled"
    scores = ScoreSet([*both().scores, PrecisionRecall(other)])
    first, second, third = scores.scores
    assert second.features is first.features
    assert third.features is other
    first.features.calls = 0
    scores.set_references(Source(train=REAL))
    assert (first.features.calls, other.calls) == (1, 1)
    scored(scores, *FAKE.split(10))
    assert (first.features.calls, other.calls) == (5, 5)


def test_duplicate_names_and_empty_sets_are_refused():
    with pytest.raises(ValueError, match="metrics must have different names, got fd_pixels, fd_pixels"):
        ScoreSet([score_of(), score_of()])
    with pytest.raises(ValueError, match="metrics must have at least one"):
        ScoreSet([])


def test_each_score_uses_its_own_reference_split():
    train, test = score_of(), score_of(KernelDistance, **KD, reference_split="test")
    scores = ScoreSet([train, test])
    assert scores.needs_reference
    scores.set_references(Source(train=REAL, test=FAKE))
    assert not scores.needs_reference
    assert (train.reference.split, train.reference.count, train.reference.fingerprint) == (
        "train",
        50,
        "abc-train",
    )
    assert (test.reference.split, test.reference.count, test.reference.fingerprint) == (
        "test",
        40,
        "abc-test",
    )
    assert scored(scores, REAL)["fd_pixels"] == pytest.approx(0, abs=1e-6)
    assert scored(scores, FAKE)["fd_pixels"] > 100


def test_setting_the_reference_drops_generated_images():
    scores = both()
    scores.set_references(Source(train=REAL))
    clean = scored(scores, FAKE)
    scores.reset()
    scores.update(REAL)
    scores.set_references(Source(train=REAL))
    scores.update(FAKE)
    assert scores.compute() == clean


def test_too_few_images_are_reported_before_generation():
    scores = both()
    scores.check_counts(15, Source(train=REAL))
    with pytest.raises(UserError, match=r"15 images \(subset_size=15\), but the generated set has 14"):
        scores.check_counts(14, Source(train=REAL))
    with pytest.raises(UserError, match=r"kd_pixels needs .* but the train split of noise has 14"):
        scores.check_counts(15, Source(train=REAL[:14]))
    with pytest.raises(
        UserError, match="fd_pixels needs at least 2 images, but the train split of noise has 1"
    ):
        scores.set_references(Source(train=REAL[:1]))


def test_shares_cover_every_image_once():
    for world_size in (1, 2, 3, 60):
        dealt = [b for rank in range(world_size) for b in share_of(Images(REAL), 4, rank, world_size)]
        assert all(len(images) <= 4 for images, *_ in dealt)
        assert sorted(k for *_, numbers in dealt for k in numbers) == list(range(len(REAL)))
        for images, _, numbers in dealt:
            assert torch.equal(images, REAL[list(numbers)])


# --- scores of each class

REAL_LABELS = torch.arange(50) % 3
FAKE_LABELS = (torch.arange(40) * 7) % 11 % 2  # classes 0 and 1, mixed; no image of class 2


def per_class(rank: int = 0, world_size: int = 1, cache: Path | None = None) -> dict[str, float]:
    """The scores of `both`, also of each class, from this rank's share of the images."""
    scores = ScoreSet(both().scores, num_classes=3)
    for score in scores.of_classes:
        score.smallest = 2  # in so small a space, any number of images will do
    source = Source(train=REAL)
    source.sets["train"].labels = REAL_LABELS
    scores.set_references(source, rank, world_size, cache)
    scores.reset()
    for images, labels, numbers in share_of(Images(FAKE, FAKE_LABELS), 7, rank, world_size):
        scores.update(images, labels, numbers)
    found = scores.compute()
    part = scores.protocol({}, "")["per_class"]["fd_pixels"]
    assert part == {
        str(k): {
            "num_images": int((k == FAKE_LABELS).sum()),
            "reference": {"0": 17, "1": 17}[str(k)],
        }
        for k in range(2)
    }
    return found


def test_scores_of_a_class_are_those_of_its_images_alone(tmp_path):
    found = per_class(cache=tmp_path)
    assert per_class(cache=tmp_path) == found
    assert len(list(tmp_path.iterdir())) == 2 * 4
    expected = both()
    expected.set_references(Source(train=REAL))
    everything = scored(expected, *FAKE.split(7))
    assert {name: value for name, value in found.items() if "class" not in name} == everything
    for label in range(2):
        alone = both()
        alone.set_references(Source(train=REAL[label == REAL_LABELS]))
        for name, value in scored(alone, FAKE[label == FAKE_LABELS]).items():
            assert found[f"{name}/class_{label}"] == pytest.approx(value, rel=1e-9)
    assert not any("class_2" in name for name in found)


def test_the_feature_network_sees_each_image_once():
    scores = ScoreSet(both().scores, num_classes=3)
    source = Source(train=REAL)
    source.sets["train"].labels = REAL_LABELS
    scores.set_references(source)
    scores.monitored.features.calls = 0
    scores.update(FAKE, FAKE_LABELS)
    assert scores.monitored.features.calls == 1


def test_too_few_images_of_a_class_are_reported_before_generation():
    scores = ScoreSet([score_of()], num_classes=3)
    source = Source(train=REAL)
    source.sets["train"].labels = REAL_LABELS
    scores.check_counts(40, source, torch.tensor([0] * 7 + [1] * 7))
    with pytest.raises(
        UserError, match=r"fd_pixels of class 1 needs at least 7 images \(6 features\), but .* has 6"
    ):
        scores.check_counts(40, source, torch.tensor([0] * 7 + [1] * 6))
    source.sets["train"].labels = torch.arange(50) % 10
    with pytest.raises(UserError, match=r"fd_pixels of class 0 needs .* but the train split of noise has 5"):
        scores.check_counts(40, source, torch.tensor([0] * 7))


# --- several processes


def scores_of_rank(rank: int, world_size: int, cache: Path) -> dict[str, float]:
    scores = both()
    scores.set_references(Source(train=REAL), rank, world_size, cache)
    scores.reset()
    for images, labels, numbers in share_of(Images(FAKE), 7, rank, world_size):
        scores.update(images, labels, numbers)
    found = scores.compute()
    assert all(score.num_images == len(FAKE) for score in scores.scores)
    # rank 1 has no images
    alone = scored(scores, *([FAKE] if rank == 0 else []))
    return found | {f"rank 0 only, {name}": value for name, value in alone.items()}


def one_process(rank: int, world_size: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    found = [
        scores_of_rank(rank, world_size, folder / "cache") | per_class(rank, world_size, folder / "cache")
        for _ in range(2)
    ]
    try:
        both().set_references(Source(train=REAL))  # a mistake: both ranks read the whole set
        message = ""
    except ValueError as error:
        message = str(error)
    few = both()
    few.set_references(Source(train=REAL), rank, world_size)
    try:
        scored(few, FAKE[:6])
    except UserError as error:
        message += str(error)
    (folder / f"{rank}.json").write_text(json.dumps([*found, message]))
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # as tests/cli/test_devices.py does by commands
def test_two_processes_give_the_scores_of_one(tmp_path):
    torch.multiprocessing.spawn(one_process, args=(2, tmp_path), nprocs=2)
    expected = scores_of_rank(0, 1, tmp_path / "alone") | per_class(0, 1, tmp_path / "alone")
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1], "the ranks differ"
    fresh, cached, message = results[0]
    assert fresh == pytest.approx(expected, rel=1e-12)
    assert cached == fresh
    assert "reference has 50 images, but fd_pixels saw 100" in message
    assert "kd_pixels needs at least 15 images (subset_size=15), but the generated set has 12" in message
    written = {file.name for file in (tmp_path / "cache").iterdir()}
    assert written == {file.name for file in (tmp_path / "alone").iterdir()}

import json
import os

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from src.evaluation.reference import ReferenceCache
from src.evaluation.scores import ScoreSet
from src.metrics.fidelity import FrechetDistance, KernelDistance
from src.runs import files
from tests.metrics.pixels import FAKE, REAL, PixelFeatures, Source, score_of

KINDS = [(FrechetDistance, {}), (KernelDistance, {"subset_size": 20})]


class Unreadable(Source):
    """A source whose images must not be read because the reference is cached."""

    def split(self, name):
        images = super().split(name)

        def images_of(indices):
            raise AssertionError("the reference was read although it is cached")

        images.images = images_of
        return images


def score(cache, source=None, kind=FrechetDistance, **settings) -> dict[str, float]:
    scores = ScoreSet([score_of(kind, **settings)])
    scores.set_references(source or Source(train=REAL), cache=cache)
    scores.update(FAKE)
    return scores.compute()


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_a_cached_reference_gives_the_same_score_without_reading_images(tmp_path, kind, settings):
    expected = score(tmp_path, kind=kind, **settings)
    assert score(tmp_path, Unreadable(train=REAL), kind, **settings) == expected


def test_only_missing_references_are_computed(tmp_path):
    score(tmp_path)
    fd, kd = score_of(), score_of(KernelDistance, subset_size=20)
    scores = ScoreSet([fd, kd])
    scores.set_references(Source(train=REAL), cache=tmp_path)
    assert fd.features.calls == 1
    assert len(list(tmp_path.iterdir())) == 2
    ScoreSet([score_of(), score_of(KernelDistance, subset_size=20)]).set_references(
        Unreadable(train=REAL), cache=tmp_path
    )


def test_other_data_weights_splits_and_states_miss_the_cache(tmp_path):
    score(tmp_path)

    class Other(Unreadable):
        name = "other"

    for missing, source in [
        (score_of(), Unreadable("changed", train=REAL)),
        (score_of(), Unreadable(train=REAL[:49])),
        (score_of(), Other(train=REAL)),
        (score_of(reference_split="test"), Unreadable(train=REAL, test=REAL)),
        (FrechetDistance(PixelFeatures(6, sha256="other")), Unreadable(train=REAL)),
        (score_of(KernelDistance, subset_size=20), Unreadable(train=REAL)),
    ]:
        with pytest.raises(AssertionError, match="although it is cached"):
            ScoreSet([missing]).set_references(source, cache=tmp_path)


def test_names_and_keys_are_those_of_earlier_versions(tmp_path):
    # the format of commit 53b46a5: existing caches stay valid
    score(tmp_path)
    (path,) = tmp_path.iterdir()
    key = {
        "format": 1,
        "states": ["count", "outer", "total"],
        "features": "pixels",
        "weights": "pixels",
        "data": "noise",
        "split": "train",
        "count": 50,
        "fingerprint": "abc-train",
    }
    assert path.name == f"noise-train-pixels-{files.digest_of(key, 16)}.safetensors"
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["key"]) == key


def with_one_flipped_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


DAMAGE = {
    "truncated": lambda content: content[:-20],
    "empty": lambda content: b"",
    "text": lambda content: b"these are no tensors",
    "a flipped bit": with_one_flipped_bit,
    "another key": lambda content: content.replace(
        b'\\"fingerprint\\": \\"abc', b'\\"fingerprint\\": \\"xyz'
    ),
    "a key that is not JSON": lambda content: content.replace(b'{\\"format', b'!\\"format'),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_reported_and_computed_again(tmp_path, caplog, kind):
    expected = score(tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    damaged = DAMAGE[kind](content)
    assert damaged != content
    path.write_bytes(damaged)
    assert score(tmp_path) == expected
    assert [record.levelname for record in caplog.records if str(path) in record.getMessage()] == ["WARNING"]
    assert score(tmp_path, Unreadable(train=REAL)) == expected, "no intact file was written"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_file_without_a_checksum_is_computed_again(tmp_path):
    expected = score(tmp_path)
    (path,) = tmp_path.iterdir()
    with safe_open(path, "pt") as file:
        key = file.metadata()["key"]
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path, {"key": key})
    assert score(tmp_path) == expected
    assert score(tmp_path, Unreadable(train=REAL)) == expected


def both() -> ScoreSet:
    return ScoreSet([score_of(), score_of(KernelDistance, subset_size=20)])


def test_folder_that_cannot_be_created_is_reported_once_and_the_score_is_computed(tmp_path, caplog):
    (tmp_path / "file").touch()
    scores = both()
    scores.set_references(Source(train=REAL), cache=tmp_path / "file" / "cache")
    scores.update(FAKE)
    assert scores.compute()["fd_pixels"] == score(None)["fd_pixels"]
    (message,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("cache=")]
    assert f"cache={tmp_path}/file/cache cannot be written (Not a directory)" in message


def test_full_disk_leaves_no_file_and_the_score_is_computed(tmp_path, caplog, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    scores = both()
    scores.set_references(Source(train=REAL), cache=tmp_path)
    assert not scores.needs_reference
    assert caplog.text.count("No space left on device") == 1
    assert not list(tmp_path.iterdir())


def test_states_survive_a_round_trip(tmp_path):
    one = score_of()
    one.update(REAL)
    states = one.states("the reference")
    source = Source(train=REAL)
    scores = ScoreSet([score_of()])
    scores.set_references(source, cache=tmp_path)
    read = ReferenceCache(tmp_path).read(one, scores.monitored.reference)
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        name: states[name].tolist() for name in one.reference_names
    }
    assert set(states) - set(read) == {"vectors", "numbers"}  # of the generated images only

"""Keys of the features of generated images."""

from types import SimpleNamespace

import pytest
import torch

from src.conditioning import ByClass, ByText, LowResolution
from src.data.source import InMemoryImages
from src.evaluation.bank import FeatureBank, Features


class Source:
    """A source whose validation split has given pixels."""

    def __init__(self, value: int):
        self.images = InMemoryImages(torch.full((2, 1, 4, 4), value, dtype=torch.uint8), None)

    def prepare(self):
        """Has nothing to do."""

    def fingerprint(self, split):
        """Of the one split."""
        assert split == "validation"
        return self.images.fingerprint()


@pytest.mark.parametrize(
    ("conditioning", "reads"),
    [
        (None, False),
        (ByClass(3), False),
        (ByText(None, prompts=["a"]), False),
        (ByText(None, captions=lambda: ["a", "b"]), True),
        (LowResolution(2, examples=lambda indices: torch.zeros(len(indices), 1, 4, 4)), True),
    ],
)
def test_features_depend_on_the_data_that_conditions_read(tmp_path, conditioning, reads):
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.write_bytes(b"weights")
    bank = FeatureBank(None)
    first, same, other = (
        bank._identity(
            SimpleNamespace(
                found=SimpleNamespace(checkpoint=checkpoint),
                record=lambda evaluations: {"steps": 2},
                recipe=SimpleNamespace(conditioning=conditioning),
                source=Source(value),
            )
        )
        for value in (1, 1, 2)
    )
    assert first == same
    assert (first != other) == reads


def test_features_of_one_space_do_not_replace_those_of_another(tmp_path, monkeypatch):
    def sample(bank, loaded, scores, numbers, batch_size, codecs):
        rows = torch.tensor(numbers)
        tensors = {f"codec | {space}": rows[:, None].float() for space in scores.spaces}
        return Features({**tensors, "labels": rows}, 2, len(numbers))

    monkeypatch.setattr(FeatureBank, "_identity", lambda bank, loaded: {"checkpoint": "a"})
    monkeypatch.setattr(FeatureBank, "_sample", sample)
    codec = SimpleNamespace(describe=lambda: "codec")
    loaded = SimpleNamespace(recipe=SimpleNamespace(codec=codec))
    requests = [("a", 5, 5), ("b", 3, 3), ("a", 5, 0), ("ab", 5, 2), ("b", 5, 0), ("c", 6, 6), ("ab", 7, 2)]
    for keeps in (True, False):
        bank = FeatureBank(tmp_path if not keeps else None)
        for spaces, n, sampled in requests:
            bank = bank if keeps else FeatureBank(tmp_path)
            found = bank.get(loaded, SimpleNamespace(spaces=list(spaces)), n, 2)
            assert found.sampled == sampled
            features, labels = found.of(codec, n)
            assert labels.tolist() == list(range(n))
            for space in spaces:
                assert features[space].flatten().tolist() == list(range(n))

"""Keys of the features of generated images."""

from types import SimpleNamespace

import pytest
import torch

from src.conditioning import ByClass, ByText, LowResolution
from src.data.source import InMemoryImages
from src.evaluation.bank import FeatureBank


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

"""What `init=` reports about the run whose weights it takes."""

import pytest

from src.app.initial import _as_text
from tests.test_conf import composed


@pytest.mark.parametrize(
    ("group", "options", "same", "other"),
    [
        (
            "codec",
            ["codec=autoencoder_kl", "codec.folder=a", "codec.sha256=abc"],
            ["codec.folder=b", "codec.batch=2", "codec.cache=elsewhere"],
            ["codec.sha256=def"],
        ),
        (
            "conditioning",
            ["conditioning=text"],
            ["conditioning.encoder.cache=elsewhere"],
            ["conditioning.encoder.max_length=7"],
        ),
        ("schedule", ["schedule=linear"], [], ["schedule=cosine"]),
    ],
)
def test_only_options_of_the_experiment_make_another_group(group, options, same, other):
    def text(*more):
        return _as_text(composed("train", *options, *more).get(group), group)

    assert text() == text(*same)
    assert text() != text(*other)
    assert "cache" not in text()

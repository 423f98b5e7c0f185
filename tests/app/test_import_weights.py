"""Refusals of `src.import_weights` that need no weights."""

from types import SimpleNamespace

import pytest

from src.app import import_weights
from src.app.options import IMPORT, check_values
from src.errors import UserError
from src.interop.network import Network


def test_a_value_that_is_no_yaml_is_one_line():
    with pytest.raises(UserError, match=r"^step=\[1: this is no YAML") as refused:
        check_values(IMPORT, {"source": "a", "out": "b", "step": "[1"})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("shape", [(1, 8, 16), (1, 16, 8), (3, 8, 8)])
def test_images_of_another_size_are_refused(monkeypatch, shape):
    monkeypatch.setattr(import_weights, "codec_of", lambda config, source: SimpleNamespace(shape=shape))
    with pytest.raises(UserError, match="the network is for images of 1 channels and 8 pixels a side"):
        import_weights.check_fit(None, None, Network({}, [], channels=1, side=8), {})

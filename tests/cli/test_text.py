"""Text conditioning through the command line, with captions of digits and a tiny encoder."""

import json

import pytest
import torch
from PIL import Image

from tests.conftest import QUICK
from tests.tiny_encoder import save_encoder

SMALL = (*QUICK, "trainer.max_steps=4", "metrics=none", "data.captions=true", "conditioning=text")


@pytest.fixture
def encoder(tmp_path):
    folder = save_encoder(tmp_path / "encoder")
    where = (f"conditioning.encoder.name={folder}", f"conditioning.encoder.cache={tmp_path / 'texts'}")
    return (*where, "conditioning.encoder.max_length=8")


def test_train_and_sample_with_prompts(command, only_run, encoder, tmp_path, capsys):
    assert command("train", *SMALL, *encoder, "callbacks.sample_images.n=4", "prompts=[the digit one]") == 0
    run = only_run()
    stored = torch.load(next((run / "checkpoints").glob("*.ckpt")), weights_only=True)["state_dict"]
    assert any("cross_attention" in name for name in stored)
    assert not any("encoder.layer" in name or "embeddings" in name for name in stored)  # the text encoder's

    options = ["sampler.steps=2", "n=4", "seed=3"]
    prompts = 'prompts=["the digit seven", "a red, red heart"]'
    for out, more in (("a", [prompts]), ("b", [prompts, "guidance.scale=3"]), ("c", [])):
        assert command("sample", f"run={run}", *options, *more, f"out={tmp_path / out}") == 0
    assert (
        json.loads((tmp_path / "a" / "prompts.json").read_text())
        == ["the digit seven", "a red, red heart"] * 2
    )
    records = {out: json.loads((tmp_path / out / "recipe.json").read_text()) for out in "abc"}
    assert "a red, red heart" in records["a"]["labels"]
    assert "['the digit one']" in records["c"]["labels"]  # the run's own
    assert records["a"]["guidance"] == "none"
    assert "scale=3" in records["b"]["guidance"]
    assert records["b"]["network_evaluations"] == 2 * records["a"]["network_evaluations"]
    assert Image.open(tmp_path / "a" / "grid.png").width > 2 * 96

    (tmp_path / "encoder").rename(tmp_path / "moved")
    capsys.readouterr()
    assert command("sample", f"run={run}", *options, prompts) == 2
    assert "conditioning.encoder.name" in capsys.readouterr().err
    options.append(f"conditioning.encoder.name={tmp_path / 'moved'}")
    (tmp_path / "prompts.txt").write_text("the digit one\n\nthe digit two\nthe digit three\n")
    assert command("sample", f"run={run}", *options, "prompts=prompts.txt", f"out={tmp_path / 'd'}") == 0
    assert json.loads((tmp_path / "d" / "prompts.json").read_text())[2:] == [
        "the digit three",
        "the digit one",
    ]
    capsys.readouterr()
    for wrong, words in (("missing.txt", "cannot be read"), ("[]", "no text"), ("3", "prompts=3")):
        assert command("sample", f"run={run}", *options, f"prompts={wrong}") == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert words in error


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["conditioning=text"], ["conditioning=text", "no captions", "data=emoji"]),
        (["prompts=[a]"], ["prompts", "conditioning=text"]),
        (["conditioning=class", "prompts=[a]"], ["prompts", "conditioning=text"]),
    ],
)
def test_data_without_captions_and_networks_without_text(command, capsys, overrides, words):
    assert command("train", *QUICK, *overrides) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(word in error for word in words)


def test_an_encoder_that_is_not_at_hand(command, capsys, monkeypatch):
    pytest.importorskip("transformers")
    assert command("train", *SMALL, "conditioning.encoder.name=./nowhere/at/all") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "conditioning.encoder.name=./nowhere/at/all" in error

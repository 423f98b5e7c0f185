import sys

import pytest
import torch

from src.metrics.classifier import load_classifier
from src.tools import train_classifier


def test_shift_moves_whole_images_by_up_to_one_pixel():
    image = torch.arange(1, 26, dtype=torch.uint8).reshape(1, 1, 5, 5)
    moved = train_classifier.shift(image.expand(200, 1, 5, 5), torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(image[0, 0], (1, 1, 1, 1))
    expected = {tuple(padded[y : y + 5, x : x + 5].flatten().tolist()) for y in range(3) for x in range(3)}
    assert {tuple(one.flatten().tolist()) for one in moved} == expected


def test_shift_moves_channels_together():
    image = torch.randint(0, 256, (1, 1, 4, 4), dtype=torch.uint8).expand(20, 3, 4, 4)
    moved = train_classifier.shift(image, torch.Generator().manual_seed(0))
    assert torch.equal(moved[:, 0], moved[:, 1])
    assert torch.equal(moved[:, 0], moved[:, 2])


def test_command_trains_a_classifier_determined_by_the_seed(tmp_path, monkeypatch):
    monkeypatch.setitem(train_classifier.EPOCHS, "digits", 4)
    files = []
    for name in ("a.safetensors", "b.safetensors"):
        output = tmp_path / name
        arguments = ["train_classifier", "data=digits", "--seed", "3", "--output", str(output)]
        monkeypatch.setattr(sys, "argv", arguments)
        train_classifier.main()
        files.append(load_classifier(output))
    (first, metadata), (second, _) = files
    assert float(metadata["test_accuracy"]) > 0.9
    assert "--seed 3" in metadata["command"]
    assert torch.equal(first.head.weight, second.head.weight)


def test_data_without_a_classifier_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_classifier", "data=cifar10"])
    with pytest.raises(SystemExit) as raised:
        train_classifier.main()
    assert raised.value.code == 2
    assert (
        "data=cifar10: no classifier for it; choose one of digits, fashion_mnist" in capsys.readouterr().err
    )


def test_an_output_that_cannot_be_written_is_refused_in_one_line_before_training(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "a.safetensors"
    monkeypatch.setattr(train_classifier, "train", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(sys, "argv", ["train_classifier", "data=digits", "--output", str(output)])
    with pytest.raises(SystemExit) as raised:
        train_classifier.main()
    assert raised.value.code == 2
    assert f"--output {output}" in capsys.readouterr().err

import pytest
import torch
from sklearn.datasets import load_digits

from src.data.digits import Digits


def test_splits_partition_the_set_and_are_stratified():
    source = Digits()
    sets = [source.split(name) for name in ("train", "validation", "test")]
    assert [len(s) for s in sets] == [1504, 147, 146]
    for held_out in sets[1:]:
        assert set(held_out.labels.bincount(minlength=10).tolist()) <= {14, 15}
    ours = torch.cat([s.pixels.flatten(1) for s in sets])
    theirs = (torch.from_numpy(load_digits().data) * 255 / 16).round()
    assert sorted(ours.tolist()) == sorted(theirs.to(torch.uint8).tolist())


def test_images_keep_their_labels():
    digits = load_digits()
    pixels = (torch.from_numpy(digits.images) * 255 / 16).round()
    label_of = {tuple(p.flatten().tolist()): int(t) for p, t in zip(pixels, digits.target, strict=True)}
    test = Digits().split("test")
    found = [label_of[tuple(image.flatten().float().tolist())] for image in test.images(range(len(test)))]
    assert found == test.labels.tolist()


def test_values_span_the_bytes():
    pixels = Digits().split("train").pixels
    assert (pixels.min(), pixels.max()) == (0, 255)
    # round(v * 255 / 16) for v = 0..16
    assert len(pixels.unique()) == 17


def test_fingerprint_depends_on_split_and_labels():
    prints = [Digits().fingerprint("train"), Digits().fingerprint("test")]
    prints += [Digits(num_classes=0).fingerprint("train")]
    assert len(set(prints)) == 3
    assert prints[0] == Digits().fingerprint("train")


def test_labels_can_be_left_out():
    assert Digits(num_classes=0).split("train").labels is None


@pytest.mark.parametrize("wrong", [{"image_size": 16}, {"channels": 3}, {"num_classes": 5}])
def test_unsupported_values_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Digits(**wrong)


def test_unknown_split():
    with pytest.raises(ValueError, match="train, validation, test"):
        Digits().split("val")

"""Emoji: names, splits and pictures."""

from importlib.util import find_spec

import pytest
import torch

from src.data.emoji import PARTS, Emoji, is_flag, parts_of, render, without_skin_tone
from src.errors import UserError

HEART, THUMB, DARK = "\u2764\ufe0f", "\U0001f44d", "\U0001f3ff"
NORWAY, SCOTLAND = (
    "\U0001f1f3\U0001f1f4",
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
)


def available() -> str:
    """Why the pictures cannot be drawn; empty if they can."""
    try:
        Emoji().check()
    except UserError as error:
        return str(error)
    return ""


needs_font = pytest.mark.skipif(bool(available()), reason=available())


def test_kinds_of_sequences():
    assert without_skin_tone(THUMB + DARK) == without_skin_tone(THUMB) == THUMB
    assert without_skin_tone(HEART) == "\u2764"
    assert [is_flag(each) for each in (NORWAY, SCOTLAND, HEART, "\U0001f3f4")] == [True, True, False, False]


def test_variants_and_equal_pictures_are_in_one_part():
    names = [chr(0x1F400 + i) for i in range(400)]
    pixels = torch.arange(400).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    parts = parts_of(names, pixels)
    assert set(parts) == set(range(PARTS))
    assert parts_of(names[::-1], pixels.flip(0).contiguous()) == parts[::-1]
    toned = parts_of([name + DARK for name in names] + names, torch.cat([pixels + 1000, pixels]))
    assert toned == parts + parts
    equal = pixels.clone()
    equal[7] = equal[3]
    assert parts_of(names, equal)[7] == parts[3]


def test_a_font_that_is_missing(tmp_path):
    if find_spec("emoji") is None:
        pytest.skip("the package emoji is not installed")
    with pytest.raises(UserError, match=r"data.root=.*apt-get install fonts-noto-color-emoji"):
        Emoji(root=str(tmp_path / "none.ttf")).check()
    (tmp_path / "text.ttf").write_text("text")
    with pytest.raises(UserError, match=r"data\.root"):
        Emoji(root=str(tmp_path / "text.ttf")).check()


def test_sizes():
    for wrong in ({"image_size": 200}, {"image_size": [32, 16]}, {"channels": 1}, {"num_classes": 3}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}"):
            Emoji(**wrong)


@needs_font
def test_pictures():
    unknown, blank = "\U0001f9d1\u200d\U0001f4a9\u200d\U0001f680\u200d\U0001f525", " "
    found = render([HEART, unknown, THUMB, blank, THUMB + DARK], Emoji()._font(), 32)
    assert found["which"].tolist() == [0, 2, 4]
    heart, thumb, dark = found["pixels"].float()
    assert found["pixels"].shape == (3, 3, 32, 32)
    assert (heart[:, 0, 0] == 255).all()  # white in the corner
    red, green, blue = heart[:, 16, 16]
    assert red > 200 > 100 > max(green, blue)
    assert thumb.mean() > dark.mean() + 10


@needs_font
def test_splits_are_captioned_and_read_from_the_cache(tmp_path, monkeypatch):
    names = {HEART: "red heart", THUMB: "thumbs up"} | {chr(0x1F400 + i): f"animal {i}" for i in range(40)}
    monkeypatch.setattr(Emoji, "_names", lambda self: names)
    splits = {}
    for _ in range(2):
        source = Emoji(image_size=16, cache=str(tmp_path))
        source.prepare()
        splits = {name: source.split(name) for name in ("train", "validation", "test")}
        monkeypatch.setattr("src.data.emoji.render", lambda *_: pytest.fail("drawn again"))
    captions = [caption for images in splits.values() for caption in images.captions]
    assert sorted(captions) == sorted(names.values())
    assert splits["train"].pixels.shape[1:] == (3, 16, 16)
    fingerprint = splits["train"].fingerprint()
    splits["train"].captions = ["other", *splits["train"].captions[1:]]
    assert splits["train"].fingerprint() != fingerprint


@needs_font
def test_choices():
    few, all_names = Emoji(flags=False)._names(), Emoji(skin_tones=True)._names()
    assert few[HEART] == "red heart"
    assert len(all_names) > 1.8 * len(few)
    assert {NORWAY, THUMB + DARK} <= set(all_names)
    assert not {NORWAY, THUMB + DARK} & set(few)

"""Emoji with their names: a small set of pictures with captions."""

import json
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from logging import getLogger
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont, features
from PIL import __version__ as pillow_version
from rich.progress import track
from torch import Tensor

from src.data.source import CACHE, ImageSet, ImageSource, InMemoryImages, Split, require, user_path
from src.data.tensor_cache import cached
from src.errors import UserError

log = getLogger(__name__)

FONT = "NotoColorEmoji.ttf"
POINTS = 109
"""The only size of the font's pictures, which have 136x128 pixels."""
CACHE_VERSION = 1
SKIN_TONES = range(0x1F3FB, 0x1F400)
VARIATION_SELECTOR = 0xFE0F
PARTS = 16
"""One sixteenth of the emoji is the validation split, another one the test split."""


class Emoji(ImageSource):
    """Pictures of the font Noto Color Emoji on white, captioned with their English names ("red heart", "cat face").

    Names and sequences are those of the package `emoji`. Sequences that the font lacks are left out. Splits are made
    by a hash of the sequence without skin tones, 14/16, 1/16 and 1/16: the skin tones of an emoji, and emoji with the
    same picture, are in the same split.

    Args:
        root: the font file; null searches the system's font folders.
        image_size: side length in pixels, at most 128.
        channels: 3.
        num_classes: 0.
        horizontal_flip: whether training may mirror the images; mirrored arrows point elsewhere.
        skin_tones: include the variants with skin tones (about 1,900 more).
        flags: include the flags of countries and regions (259).
        cache: folder of the rendered pictures.
    """

    name = "emoji"
    captioned = True

    def __init__(
        self,
        root: str | None = None,
        image_size: int = 32,
        channels: int = 3,
        num_classes: int = 0,
        horizontal_flip: bool = False,
        skin_tones: bool = False,
        flags: bool = True,
        cache: str = CACHE,
    ):
        require("channels", channels, 3)
        require("num_classes", num_classes, 0)
        super().__init__(image_size, channels, num_classes, horizontal_flip)
        if self.image_shape[1] != self.image_shape[2] or self.image_shape[1] > 128:
            raise ValueError(
                f"image_size must be one number, at most 128, for this data set, got {image_size}"
            )
        self.root = root
        self.skin_tones = skin_tones
        self.flags = flags
        self.cache = cache

    def check(self) -> None:
        if find_spec("emoji") is None:
            raise UserError("data=emoji needs the package emoji: pip install emoji")
        if not features.check("raqm"):
            raise UserError(
                "data=emoji needs Pillow with raqm, to draw emoji of several characters: reinstall Pillow"
            )
        self._font()

    def prepare(self) -> None:
        self.check()
        _ = self._pictures

    def _font(self) -> ImageFont.FreeTypeFont:
        path = FONT if self.root is None else str(user_path(self.root, "data.root"))
        try:
            return ImageFont.truetype(path, POINTS, layout_engine=ImageFont.Layout.RAQM)
        except OSError:
            where = "is not installed" if self.root is None else "cannot be read as that font"
            raise UserError(
                f"data.root={self.root or 'null'}: Noto Color Emoji {where}: apt-get install fonts-noto-color-emoji,"
                f" or set data.root to {FONT}"
            ) from None

    def _names(self) -> dict[str, str]:
        """The name of each sequence, in the order of the sequences."""
        import emoji

        qualified = emoji.STATUS["fully_qualified"]
        return {
            sequence: record["en"].strip(":").replace("_", " ")
            for sequence, record in sorted(emoji.EMOJI_DATA.items())
            if record["status"] == qualified
            and (
                self.skin_tones
                or without_skin_tone(sequence) == sequence.replace(chr(VARIATION_SELECTOR), "")
            )
            and (self.flags or not is_flag(sequence))
        }

    @cached_property
    def _pictures(self) -> tuple[list[str], list[str], Tensor]:
        """Sequences, captions and pictures, uint8 (n, 3, S, S), of all splits."""
        names, font = self._names(), self._font()
        size = self.image_shape[1]
        key = json.dumps(
            [
                CACHE_VERSION,
                sha256(Path(font.path).read_bytes()).hexdigest(),
                pillow_version,
                size,
                list(names),
            ]
        )
        path = (
            user_path(self.cache, "data.cache") / f"emoji_{sha256(key.encode()).hexdigest()[:32]}.safetensors"
        )
        found = cached(path, lambda: render(list(names), font, size))
        sequences = [list(names)[i] for i in found["which"].tolist()]
        return sequences, [names[sequence] for sequence in sequences], found["pixels"]

    def _load(self, split: Split) -> ImageSet:
        self.check()
        sequences, captions, pixels = self._pictures
        parts = parts_of(sequences, pixels)
        wanted = {"validation": [0], "test": [1]}.get(split, range(2, PARTS))
        chosen = [i for i, part in enumerate(parts) if part in wanted]
        return InMemoryImages(pixels[chosen], None, [captions[i] for i in chosen])


def without_skin_tone(sequence: str) -> str:
    """The characters of an emoji without skin tones and variation selectors."""
    return "".join(c for c in sequence if ord(c) not in SKIN_TONES and ord(c) != VARIATION_SELECTOR)


def is_flag(sequence: str) -> bool:
    """Whether an emoji is the flag of a country or region: a pair of regional indicators, or a tagged black flag."""
    return 0x1F1E6 <= ord(sequence[0]) <= 0x1F1FF or "\U000e007f" in sequence


def parts_of(sequences: Sequence[str], pixels: Tensor) -> list[int]:
    """Which of the `PARTS` each emoji belongs to: skin tones of one emoji, and equal pictures, to the same."""
    of_picture: dict[bytes, str] = {}
    of_emoji: dict[str, str] = {}
    for sequence, picture in sorted(
        zip(sequences, pixels.numpy(), strict=True), key=lambda pair: len(pair[0])
    ):
        emoji = without_skin_tone(sequence)
        of_emoji.setdefault(emoji, of_picture.setdefault(picture.tobytes(), emoji))
    hashes = [sha256(of_emoji[without_skin_tone(sequence)].encode()).digest() for sequence in sequences]
    return [int.from_bytes(each[:8]) % PARTS for each in hashes]


def render(sequences: Sequence[str], font: ImageFont.FreeTypeFont, size: int) -> dict[str, Tensor]:
    """Draws emoji on white.

    Args:
        sequences: the emoji.
        font: Noto Color Emoji, at its size.
        size: side length of the pictures, in pixels.

    Returns:
        "pixels": uint8 (n, 3, size, size), of the emoji that the font has; "which": their places in `sequences`.
    """
    width = font.getlength("\U0001f600")  # of one picture
    pixels, which = [], []
    for i, sequence in enumerate(track(sequences, description="drawing emoji", transient=True)):
        if font.getlength(sequence) > width:  # several pictures, since the font lacks the sequence
            continue
        canvas = Image.new("RGBA", (int(width), int(width)), "white")
        ImageDraw.Draw(canvas).text(
            (width / 2, width / 2), sequence, font=font, embedded_color=True, anchor="mm"
        )
        picture = canvas.convert("RGB")
        if ImageChops.invert(picture).getbbox() is None:
            continue
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
        pixels.append(torch.from_numpy(np.array(picture)).movedim(-1, 0))
        which.append(i)
    return {"pixels": torch.stack(pixels), "which": torch.tensor(which)}

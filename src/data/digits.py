"""scikit-learn's handwritten digits: the smallest real set of images, without a download."""

from importlib.util import find_spec

import torch

from src.data.captions import DIGIT_TEMPLATES, DIGITS, from_templates
from src.data.source import ImageSet, ImageSource, InMemoryImages, Split, require
from src.errors import UserError


class Digits(ImageSource):
    """1,797 digits of 8x8 grey pixels in 10 classes: the test part of UCI `optdigits` (Alpaydin, Kaynak).

    Values 0..16 become bytes by round(v * 255 / 16). Splits, by the place k of an image among those of its
    class: validation k mod 12 = 10 (147 images), test k mod 12 = 11 (146), train the rest (1,504). Each split
    holds all classes in nearly equal shares, independently of the seed.

    Args:
        image_size: 8.
        channels: 1.
        num_classes: 10, or 0 for no labels.
        horizontal_flip: whether training may mirror the images; mirrored digits are no digits.
        captions: whether the images have captions, e.g. "the digit three"; see `src.data.captions`.
    """

    name = "digits"

    def __init__(
        self,
        image_size: int = 8,
        channels: int = 1,
        num_classes: int = 10,
        horizontal_flip: bool = False,
        captions: bool = False,
    ):
        require("image_size", image_size, 8)
        require("channels", channels, 1)
        require("num_classes", num_classes, 10, 0)
        super().__init__(image_size, channels, num_classes, horizontal_flip)
        self.captioned = captions

    def check(self) -> None:
        if find_spec("sklearn") is None:
            raise UserError("data=digits needs the package scikit-learn: pip install scikit-learn")

    def _load(self, split: Split) -> ImageSet:
        self.check()
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(digits.target).to(torch.int64)
        place = torch.empty_like(labels)
        for label in range(10):
            members = labels == label
            place[members] = torch.arange(int(members.sum())) % 12
        chosen = {"train": place < 10, "validation": place == 10, "test": place == 11}[split]
        labels = labels[chosen]
        captions = from_templates(labels, DIGITS, DIGIT_TEMPLATES) if self.captioned else None
        return InMemoryImages(pixels[chosen], labels if self.num_classes else None, captions)

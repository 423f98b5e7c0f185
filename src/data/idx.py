"""The idx format of MNIST (LeCun, Cortes, Burges 1998) and the data sets that come in it."""

import gzip
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from src.data.captions import from_templates
from src.data.source import CACHE, ImageSet, ImageSource, InMemoryImages, Split, require, user_path
from src.errors import UserError

IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Reads an idx file of unsigned bytes, gzipped (name ends in .gz) or raw.

    The format: two zero bytes, 0x08 for unsigned bytes, the number of dimensions; each dimension as a
    big-endian 32-bit integer; the bytes.

    Returns:
        uint8, with the file's dimensions.

    Raises:
        UserError: if the file is truncated or too long, or is not an idx file of that many dimensions.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): replace the file") from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes([0, 0, 8, dimensions]):
        raise UserError(f"{path} is not an idx file of bytes in {dimensions} dimensions: replace the file")
    shape = tuple(np.frombuffer(content[4:start], dtype=">u4").tolist())
    if len(content) - start != prod(shape):
        raise UserError(
            f"{path} holds {len(content) - start} bytes, its header says {prod(shape)}: replace the file"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)


class IdxSource(ImageSource):
    """60,000 training and 10,000 test images of 28x28 grey pixels in 10 classes, as four idx files.

    Splits: train is the whole training set, since published FIDs train on all of it and take all of it as
    their reference; validation and test are both the official test set, so tune on neither if you
    report results on it.

    Args:
        root: folder with the four files, gzipped or not, or their torchvision root; null is the system's
            folder, then the cache, to which they are downloaded if both lack them.
        image_size: 28, or 32 with two black pixels added on each side, so that it can be halved five times.
        channels: 1.
        num_classes: 10, or 0 for no labels.
        horizontal_flip: whether training may mirror the images.
        captions: whether the images have captions, made from their classes; see `src.data.captions`.

    Attributes:
        caption_names: names of the classes in captions.
        caption_templates: see `from_templates`.
    """

    system_folder: str | None = None
    caption_names: ClassVar[Sequence[str]]
    caption_templates: ClassVar[Sequence[str]]

    def __init__(
        self,
        root: str | None = None,
        image_size: int = 28,
        channels: int = 1,
        num_classes: int = 10,
        horizontal_flip: bool = False,
        captions: bool = False,
    ):
        require("image_size", image_size, 28, 32)
        require("channels", channels, 1)
        require("num_classes", num_classes, 10, 0)
        super().__init__(image_size, channels, num_classes, horizontal_flip)
        self.root = root
        self.captioned = captions

    @abstractmethod
    def download(self, folder: Path) -> None:
        """Puts the files under `folder`, as torchvision lays them out."""

    def check(self) -> None:
        if self.root is not None and self._folder() is None:
            raise UserError(
                f"data.root={self.root} does not hold the four files of {self.name} (train-{IMAGES}[.gz], "
                "...): give their folder, or data.root=null to download them"
            )

    def prepare(self) -> None:
        self.check()
        if self._folder() is not None:
            return
        try:
            self.download(user_path(CACHE, "data.root"))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{self.name} cannot be downloaded ({' '.join(str(error).split())}): "
                "set data.root to a folder with its four idx files"
            ) from error

    def _load(self, split: Split) -> ImageSet:
        self.prepare()
        part = "train" if split == "train" else "t10k"
        folder = self._folder()
        image_file, label_file = _file(folder, f"{part}-{IMAGES}"), _file(folder, f"{part}-{LABELS}")
        pixels, labels = read_idx(image_file, 3), read_idx(label_file, 1).to(torch.int64)
        if pixels.shape[1:] != (28, 28) or len(pixels) != len(labels):
            raise UserError(
                f"{image_file} holds images of shape {tuple(pixels.shape)} and {label_file} {len(labels)} "
                f"labels; {self.name} has 28x28 pixels and one label per image: replace the files"
            )
        border = (self.image_size - 28) // 2
        captions = None
        if self.captioned:
            captions = from_templates(labels, self.caption_names, self.caption_templates)
        return InMemoryImages(
            pad(pixels.unsqueeze(1), (border,) * 4), labels if self.num_classes else None, captions
        )

    def _folder(self) -> Path | None:
        roots = [self.root] if self.root is not None else [self.system_folder, CACHE]
        parts = [f"{part}-{kind}" for part in ("train", "t10k") for kind in (IMAGES, LABELS)]
        for root in filter(None, roots):
            path = user_path(root, "data.root")
            for folder in (path, path / type(self).__name__ / "raw"):
                if all(_file(folder, part) is not None for part in parts):
                    return folder
        return None


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)

"""CIFAR-10."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from src.data.source import CACHE, ImageSet, ImageSource, InMemoryImages, Split, require, user_path
from src.errors import UserError

FOLDER = "cifar-10-batches-py"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
"""As in the data set's batches.meta."""
FILES: dict[str, list[str]] = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Reads one file of the "Python version": a pickled dictionary of pixels and labels.

    Returns:
        images, uint8 (n, 3, 32, 32), and labels, int64 (n,).

    Raises:
        UserError: if the file is truncated, is something else, or would run code.
    """
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="latin1").load()
        data, labels = content["data"], content["labels"]
    # A damaged pickle can raise anything.
    except Exception as error:
        raise UserError(f"{path} cannot be read as a CIFAR-10 batch ({error}): replace the file") from error
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (len(labels), 3 * 32 * 32):
        raise UserError(f"{path} does not hold one 3x32x32 image of bytes per label: replace the file")
    return torch.tensor(data).reshape(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.int64)


class _ArraysOnly(pickle.Unpickler):
    """Builds numpy arrays and nothing else, so that an untrusted file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        # The published files name numpy.core, which is numpy._core now.
        if (module.replace("numpy.core", "numpy._core"), name) == ("numpy._core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class CIFAR10(ImageSource):
    """60,000 colour photographs of 32x32 pixels in 10 classes (Krizhevsky 2009).

    Splits: train is the whole training set of 50,000, since published FIDs train on all of it and take all of
    it as their reference; validation and test are both the official test set of 10,000, on which published
    bits per dimension are measured, so tune on neither if you report results on it.

    Args:
        root: folder that holds cifar-10-batches-py, or that folder; null is the cache, to which the set is downloaded.
        image_size: 32.
        channels: 3.
        num_classes: 10, or 0 for no labels.
        horizontal_flip: whether training may mirror the images, as DDPM does.
    """

    name = "cifar10"

    def __init__(
        self,
        root: str | None = None,
        image_size: int = 32,
        channels: int = 3,
        num_classes: int = 10,
        horizontal_flip: bool = True,
    ):
        require("image_size", image_size, 32)
        require("channels", channels, 3)
        require("num_classes", num_classes, 10, 0)
        super().__init__(image_size, channels, num_classes, horizontal_flip)
        self.root = root

    @property
    def class_names(self) -> list[str]:
        return CLASSES[: self.num_classes]

    def check(self) -> None:
        if self.root is not None and self._folder() is None:
            raise UserError(
                f"data.root={self.root} does not hold {FOLDER} with data_batch_1 ... 5 and test_batch: give "
                "its folder, or data.root=null to download it"
            )

    def prepare(self) -> None:
        self.check()
        if self._folder() is not None:
            return
        from torchvision.datasets import CIFAR10 as Download

        try:
            Download(user_path(CACHE, "data.root"), download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cifar10 cannot be downloaded ({' '.join(str(error).split())}): "
                f"set data.root to a folder that holds {FOLDER}"
            ) from error

    def _load(self, split: Split) -> ImageSet:
        self.prepare()
        folder = self._folder()
        files = FILES["train" if split == "train" else "test"]
        images, labels = zip(*(read_batch(folder / name) for name in files), strict=True)
        return InMemoryImages(torch.cat(images), torch.cat(labels) if self.num_classes else None)

    def _folder(self) -> Path | None:
        root = user_path(CACHE if self.root is None else self.root, "data.root")
        names = FILES["train"] + FILES["test"]
        folders = (folder for folder in (root, root / FOLDER) if all((folder / n).is_file() for n in names))
        return next(folders, None)

"""Any folder of image files."""

import os
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from logging import getLogger
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from src.data.decode import problem
from src.data.folder_index import FolderIndex, Record, list_images, printable
from src.data.folder_layout import FolderLayout
from src.data.folder_report import report_classes, report_content, report_left_out, report_sizes, some
from src.data.source import CACHE, ImageSet, ImageSource, Split, user_path
from src.errors import UserError

log = getLogger(__name__)


class ImageFolder(ImageSource):
    """Image files under a folder, at any depth: png, jpg, jpeg, webp, bmp, gif, tif, tiff.

    Every file is decoded once before the first run and remembered by path, size and time of change, so that
    no run stops in the middle on a broken one. `src.data.decode` describes the conversion to pixels. An image
    is scaled until it covers image_size, then its centre is cropped. Hidden files are left out. Links are
    followed, but no file is used twice.

    Splits: the subfolders train (or training), val (or valid, validation) and test (or testing), in any case,
    where there is train and one of the others; a missing one of validation and test is the same as the other.
    Otherwise a hash of each file's path below the root decides: a file stays in its split when others come or
    go, independently of the seed. The order is that of the paths.

    Labels: the first level of folders (below train, where there is one), in alphabetical order.

    Args:
        root: the folder.
        image_size: of the images given out, in pixels: one number, or [height, width].
        channels: 1 or 3.
        num_classes: number of class folders, or 0 for an unlabelled set, whose folders mean nothing.
        horizontal_flip: whether training may mirror the images.
        holdout: share of the images in validation, and again in test; in [0, 0.5).
        min_size: an image whose shorter side has fewer pixels counts as faulty. Others smaller than
            image_size are enlarged, with a warning.
        on_error: "stop" at faulty files, or "skip" them with a warning.
        white: value of white in grey files with more than 8 bits per channel, e.g. 4095 where 16-bit files hold
            12 bits; null is the largest value of unsigned integers of up to 16 bits, and 1 for floats.
        memory_limit_mb: a set of at most this many MB (2^20 bytes) is held in memory, as a mapped file that
            processes share; a larger one is decoded at every use, for which workers should be set.
        cache: folder of the index and the decoded pixels.
    """

    name = "image_folder"

    def __init__(
        self,
        root: str | None,
        image_size: int | Sequence[int],
        channels: int = 3,
        num_classes: int = 0,
        horizontal_flip: bool = False,
        holdout: float = 0.05,
        min_size: int = 1,
        on_error: str = "stop",
        white: float | None = None,
        memory_limit_mb: float = 2048,
        cache: str = CACHE,
    ):
        super().__init__(image_size, channels, num_classes, horizontal_flip)
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
        if not 0 <= holdout < 0.5:
            raise ValueError(f"holdout must be in [0, 0.5), since it is taken twice, got {holdout}")
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}")
        if white is not None and not white > 0:
            raise ValueError(f"white must be positive or null, got {white}")
        self.root = None if root is None else user_path(root, "data.root")
        self.holdout = holdout
        self.min_size = min_size
        self.on_error = on_error
        self.white = white
        self.memory_limit_mb = memory_limit_mb
        self.cache = user_path(cache, "data.cache") / "image_folder"
        self._catalogue: _Catalogue | None = None

    @property
    def class_names(self) -> list[str]:
        self.check()
        return [printable(name) for name in self._layout.classes] if self.num_classes else []

    def check(self) -> None:
        if self.root is None:
            raise UserError("data.root is not set: data=image_folder needs data.root=FOLDER_OF_IMAGES")
        if not self.root.is_dir() or not os.access(self.root, os.R_OK | os.X_OK):
            raise UserError(f"{self._where} is not a readable folder: set data.root to a folder of images")
        if not any(self.root.iterdir()):
            raise UserError(f"{self._where} is empty: set data.root to a folder of images")
        classes = self._layout.classes
        if self.num_classes not in (0, len(classes)):
            fix = f"set data.num_classes={len(classes)}" + (", or 0 for no labels" if classes else "")
            raise UserError(
                f"{self._where} has {len(classes)} class folders ({some(classes) or 'none'}), "
                f"not data.num_classes={self.num_classes}: {fix}"
            )

    def prepare(self) -> None:
        """Indexes the folder; the first time this decodes every file, in threads, with a progress bar."""
        if self._catalogue is None:
            self.check()
            self._catalogue = self._index()

    def _load(self, split: Split) -> ImageSet:
        self.prepare()
        entries = [e for e in self._catalogue.entries if split in self._layout.splits(e.path, self.holdout)]
        if not entries:
            self._report_empty(split)
        labels = None
        if self.num_classes:
            label_of = {name: label for label, name in enumerate(self._layout.classes)}
            given = [label_of[self._layout.class_of(entry.path)] for entry in entries]
            labels = torch.tensor(given, dtype=torch.int64)
        if self._catalogue.pixels is None:
            return StreamedFiles(self._folder, entries, labels)
        rows = torch.tensor([entry.row for entry in entries], dtype=torch.int64)
        return DecodedFiles(self._catalogue.pixels, rows, labels)

    @cached_property
    def _layout(self) -> FolderLayout:
        return FolderLayout(self.root)

    @property
    def _folder(self) -> FolderIndex:
        return FolderIndex(self.root, self.cache, self.image_shape, self.white)

    @property
    def _where(self) -> str:
        return f"data.root={printable(self.root)}"

    def _index(self) -> "_Catalogue":
        listing = list_images(self.root, self._layout.starts)
        if not listing.files:
            raise UserError(f"{self._where} holds no images (png, jpg, webp, bmp, gif, tiff)")
        in_memory = len(listing.files) * prod(self.image_shape) <= self.memory_limit_mb * 2**20
        records, pixels = self._folder.examine(listing.files, in_memory)
        entries, faults = [], []
        row = 0  # of the pixels, which hold what could be decoded
        for file, record in zip(listing.files, records, strict=True):
            if record.problem is not None:
                faults.append(f"{file.path} ({record.problem})")
                continue
            if min(record.width, record.height) < self.min_size:
                faults.append(f"{file.path} ({record.width}x{record.height} pixels)")
            else:
                entries.append(_Entry(file.path, row, record))
            row += 1
        if faults and (self.on_error == "stop" or not entries):
            fix = "set data.on_error=skip to leave them out" if entries else "no image is left"
            raise UserError(
                f"{len(faults)} of {len(records)} images in {self._where} cannot be used: {some(faults)}; {fix}"
            )
        images = {entry.path: entry.record for entry in entries}
        report_left_out(self._where, listing, faults)
        report_sizes(self._where, images, self.image_size, self.image_shape)
        report_content(self._where, images)
        if self.num_classes:
            self._check_classes(list(images))
            report_classes(self._where, self.class_names)
        return _Catalogue(entries, pixels)

    def _report_empty(self, split: Split) -> None:
        folder = self._layout.split_folders.get(split)
        if split == "train" and folder:
            raise UserError(f"{self._where} has no training images: put some into its folder {folder}")
        if split == "train":
            raise UserError(
                f"{self._where} has no training images, since all {len(self._catalogue.entries)} fall into "
                "validation and test: set data.holdout=0 to train on all of them"
            )
        if split == "validation" and (folder or self.holdout):
            log.warning("%s has no validation images, so there will be no validation loss", self._where)

    def _check_classes(self, paths: list[str]) -> None:
        classes = set(self._layout.classes)
        given = {path: self._layout.class_of(path) for path in paths}
        outside = [path for path, name in given.items() if name not in classes]
        if outside:
            raise UserError(
                f"{len(outside)} images in {self._where} lie in none of its class folders: "
                f"{some(outside)}; move them, or set data.num_classes=0 for no labels"
            )
        empty = sorted(classes.difference(given.values()))
        if empty:
            raise UserError(
                f"class folders in {self._where} without a usable image: {some(empty)}; "
                "remove them or put images there"
            )


class DecodedFiles(ImageSet):
    """Rows of one large tensor that all splits share.

    Args:
        pixels: uint8 (N, C, H, W).
        rows: int64 (n,), this set's rows.
        labels: int64 (n,) or None.
    """

    def __init__(self, pixels: Tensor, rows: Tensor, labels: Tensor | None):
        self.pixels = pixels
        self.rows = rows
        self.labels = labels

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        return self.pixels.index_select(0, self.rows[torch.as_tensor(indices, dtype=torch.int64)])

    def fingerprint(self) -> str:
        """A hash of the pixels and labels."""
        digest = sha256(f"{tuple(self.pixels.shape[1:])}".encode())
        for rows in self.rows.split(1024):
            digest.update(memoryview(self.pixels.index_select(0, rows).numpy()))
        if self.labels is not None:
            digest.update(memoryview(self.labels.numpy()))
        return digest.hexdigest()


class StreamedFiles(ImageSet):
    """Files that are decoded at every use.

    Args:
        index: of their folder.
        entries: the files, n of them.
        labels: int64 (n,) or None.
    """

    def __init__(self, index: FolderIndex, entries: list["_Entry"], labels: Tensor | None):
        self.index = index
        self.entries = entries
        self.labels = labels

    def __len__(self) -> int:
        return len(self.entries)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        chosen = torch.as_tensor(indices, dtype=torch.int64).tolist()
        images = torch.empty(len(chosen), *self.index.image_shape, dtype=torch.uint8)
        for image, i in zip(images, chosen, strict=True):
            path = self.index.root / self.entries[i].path
            try:
                image.copy_(self.index.decode(path.read_bytes()))
            except Exception as error:
                self.index.forget()
                raise UserError(
                    f"{printable(path)} could be read when it was indexed and cannot be read now "
                    f"({problem(error)}): restore the file, or start again with data.on_error=skip"
                ) from error
        return images

    def fingerprint(self) -> str:
        """Of shape, labels and the bytes of the files when they were indexed.

        Independent of names, places and times of change, so that a copy of the folder has the same one.
        """
        digest = sha256(f"{(self.index.image_shape, self.index.white)}".encode())
        for entry in self.entries:
            digest.update(entry.record.digest.encode())
        if self.labels is not None:
            digest.update(memoryview(self.labels.numpy()))
        return digest.hexdigest()


class _Entry(NamedTuple):
    path: str
    row: int
    record: Record


class _Catalogue(NamedTuple):
    entries: list[_Entry]
    pixels: Tensor | None

"""Any folder of image files."""

import os
from collections.abc import Sequence
from functools import cached_property
from logging import getLogger

from src.data.folder_index import FolderIndex, list_images, printable
from src.data.folder_layout import FolderLayout
from src.data.folder_report import report_classes, report_others, some
from src.data.indexed import Catalogue, Entry, IndexedSource
from src.data.source import CACHE, Split, user_path
from src.errors import UserError

log = getLogger(__name__)


class ImageFolder(IndexedSource):
    """Image files under a folder, at any depth: png, jpg, jpeg, webp, bmp, gif, tif, tiff.

    Every file is decoded once before the first run and remembered by path, size and time of change, so that
    no run stops in the middle on a broken one. Hidden files are left out. Links are followed, but no file is used
    twice. See `IndexedSource` for the conversion to pixels.

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
        super().__init__(
            *(image_size, channels, num_classes, horizontal_flip, holdout),
            *(min_size, on_error, white, memory_limit_mb, cache),
        )
        self.root = None if root is None else user_path(root, "data.root")

    @property
    def class_names(self) -> list[str]:
        if not self.num_classes:
            return []  # also where the folder is missing: sampling needs no images
        self.check()
        return [printable(name) for name in self._layout.classes]

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

    @cached_property
    def _layout(self) -> FolderLayout:
        return FolderLayout(self.root)

    @property
    def _images(self) -> FolderIndex:
        return FolderIndex(root=self.root, cache=self.cache, image_shape=self.image_shape, white=self.white)

    @property
    def _where(self) -> str:
        return f"data.root={printable(self.root)}"

    def _index(self) -> Catalogue:
        listing = list_images(self.root, self._layout.starts)
        if not listing.files:
            raise UserError(f"{self._where} holds no images (png, jpg, webp, bmp, gif, tiff)")
        catalogue = self._examine(listing.files)
        report_others(self._where, listing)
        if self.num_classes:
            self._check_classes([entry.path for entry in catalogue.entries])
            report_classes(self._where, self.class_names)
        return catalogue

    def _splits(self, entry: Entry) -> set[Split]:
        return self._layout.splits(entry.path, self.holdout)

    def _label(self, path: str) -> int:
        return self._labels[self._layout.class_of(path)]

    @cached_property
    def _labels(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self._layout.classes)}

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

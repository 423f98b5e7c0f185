"""Any folder of image files."""

import os
from collections.abc import Sequence
from hashlib import blake2b, sha256
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from src.data.decode import decode, fit, problem
from src.data.folder_index import Record, examine, forget, list_images
from src.data.source import CACHE, ImageSet, ImageSource, Split
from src.errors import UserError

log = getLogger(__name__)

VALIDATION_NAMES = ("val", "valid", "validation")


class ImageFolder(ImageSource):
    """Image files under a folder, at any depth: png, jpg, jpeg, webp, bmp, gif, tif, tiff.

    Every file is decoded once before the first run and remembered by path, size and time of change, so that
    no run stops in the middle on a broken one. `src.data.decode` says how kinds of pixels are converted; the
    shorter side is scaled to image_size and the centre cut out. Hidden files are left out. Links are
    followed, but no file is taken twice.

    Splits: the subfolders train, val (or valid, validation) and test where there is train and one of the
    others; of validation and test, a missing one is the same as the other. Else by a hash of each file's path
    below the root: a file stays in its split when others come or go, and no seed decides. The order is that
    of the paths.

    Labels: the first level of folders (below train, where there is one), in alphabetical order.

    Args:
        root: the folder.
        image_size: height and width of the images given out, in pixels.
        channels: 1 or 3.
        num_classes: number of class folders, or 0 for an unlabelled set, whose folders mean nothing.
        horizontal_flip: whether training may mirror the images.
        holdout: share of the images in validation, and again in test; in [0, 0.5).
        min_size: an image whose shorter side has fewer pixels counts as faulty. Others smaller than
            image_size are enlarged, with a warning.
        on_error: "stop" at faulty files, or "skip" them with a warning.
        memory_limit_mb: a set of at most this many MB (2^20 bytes) is held in memory, as a mapped file that
            processes share; a larger one is decoded at every use, which wants workers.
        cache: folder for the index and the decoded pixels.
    """

    name = "image_folder"

    def __init__(
        self,
        root: str | None,
        image_size: int,
        channels: int = 3,
        num_classes: int = 0,
        horizontal_flip: bool = False,
        holdout: float = 0.05,
        min_size: int = 1,
        on_error: str = "stop",
        memory_limit_mb: float = 2048,
        cache: str = CACHE,
    ):
        if image_size < 1:
            raise ValueError(f"image_size={image_size} must be at least 1")
        if channels not in (1, 3):
            raise ValueError(f"channels={channels} must be 1 (grey) or 3 (RGB)")
        if num_classes < 0:
            raise ValueError(
                f"num_classes={num_classes} must be 0 (unlabelled) or the number of class folders"
            )
        if not 0 <= holdout < 0.5:
            raise ValueError(f"holdout={holdout} must be in [0, 0.5), since it is taken twice")
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error={on_error!r} must be 'stop' or 'skip'")
        super().__init__(image_size, channels, num_classes, horizontal_flip)
        self.root = None if root is None else Path(root).expanduser()
        self.holdout = holdout
        self.min_size = min_size
        self.on_error = on_error
        self.memory_limit_mb = memory_limit_mb
        self.cache = Path(cache).expanduser() / "image_folder"
        self._catalogue: _Catalogue | None = None

    def check(self) -> None:
        if self.root is None:
            raise UserError("data.root is not set: data=image_folder needs data.root=FOLDER_OF_IMAGES")
        if not self.root.is_dir() or not os.access(self.root, os.R_OK | os.X_OK):
            raise UserError(
                f"data.root={self.root} is not a readable folder: set data.root to a folder of images"
            )
        if not any(self.root.iterdir()):
            raise UserError(f"data.root={self.root} is empty: set data.root to a folder of images")
        if self.num_classes:
            classes = self._classes()
            if len(classes) != self.num_classes:
                cure = f"set data.num_classes={len(classes)}" + (", or 0 for no labels" if classes else "")
                raise UserError(
                    f"data.root={self.root} has {len(classes)} class folders ({_some(classes) or 'none'}), "
                    f"not data.num_classes={self.num_classes}: {cure}"
                )

    def prepare(self) -> None:
        """Indexes the folder; the first time this decodes every file, in threads, with a progress bar."""
        if self._catalogue is None:
            self.check()
            self._catalogue = self._index()

    def _load(self, split: Split) -> ImageSet:
        self.prepare()
        folders = self._split_folders()
        entries = [entry for entry in self._catalogue.entries if split in self._splits(entry.path, folders)]
        labels = None
        if self.num_classes:
            classes = {name: label for label, name in enumerate(self._classes())}
            labels = torch.tensor([classes[name] for name in self._classes_of(entries)], dtype=torch.int64)
        if self._catalogue.pixels is not None:
            rows = torch.tensor([entry.row for entry in entries], dtype=torch.int64)
            return DecodedFiles(self._catalogue.pixels, rows, labels)
        return StreamedFiles(self.root, entries, labels, self.image_size, self.channels, self.cache)

    def _index(self) -> "_Catalogue":
        folders = self._split_folders()
        starts = [self.root / name for name in sorted(set(folders.values()))] or [self._base()]
        files, others, repeated = list_images(self.root, starts)
        if not files:
            raise UserError(f"data.root={self.root} holds no images (png, jpg, webp, bmp, gif, tiff)")
        if others:
            kinds = ", ".join(f"{n} {kind or 'without extension'}" for kind, n in others.most_common(5))
            log.info("data.root=%s: left out %d other files (%s)", self.root, others.total(), kinds)
        if repeated:
            log.warning("data.root=%s: left out %d links to files that it holds anyway", self.root, repeated)
        in_memory = len(files) * self.channels * self.image_size**2 <= self.memory_limit_mb * 2**20
        records, pixels = examine(self.root, files, self.cache, self.image_size, self.channels, in_memory)
        entries, faults, enlarged = [], [], []
        for row, (file, record) in enumerate(zip(files, records, strict=True)):
            shorter = min(record.width, record.height)
            if record.problem is not None:
                faults.append(f"{file.path} ({record.problem})")
            elif shorter < self.min_size:
                faults.append(f"{file.path} ({record.width}x{record.height} pixels)")
            else:
                entries.append(_Entry(file.path, row, record))
                if shorter < self.image_size:
                    enlarged.append(f"{file.path} ({record.width}x{record.height})")
        self._report(len(files), faults, enlarged)
        if self.num_classes:
            self._check_classes(entries)
        return _Catalogue(entries, pixels)

    def _report(self, total: int, faults: list[str], enlarged: list[str]) -> None:
        if faults and (self.on_error == "stop" or len(faults) == total):
            cure = "set data.on_error=skip to leave them out" if len(faults) < total else "no image is left"
            raise UserError(
                f"{len(faults)} of {total} images in data.root={self.root} cannot be used: "
                f"{_some(faults)}; {cure}"
            )
        if faults:
            log.warning("left out %d of %d images that cannot be used:", len(faults), total)
            for fault in faults:
                log.warning("  %s", fault)
        if enlarged:
            log.warning(
                "%d of %d images are smaller than data.image_size=%d and are enlarged: %s; "
                "data.min_size=%d with data.on_error=skip leaves them out",
                *(len(enlarged), total, self.image_size, _some(enlarged), self.image_size),
            )

    def _check_classes(self, entries: list["_Entry"]) -> None:
        classes, given = set(self._classes()), self._classes_of(entries)
        outside = [entry.path for entry, name in zip(entries, given, strict=True) if name not in classes]
        if outside:
            raise UserError(
                f"{len(outside)} images in data.root={self.root} lie in none of its class folders: "
                f"{_some(outside)}; move them, or set data.num_classes=0 for no labels"
            )
        empty = sorted(classes.difference(given))
        if empty:
            raise UserError(
                f"class folders in data.root={self.root} without a usable image: {_some(empty)}; "
                "remove them or put images there"
            )

    def _base(self) -> Path:
        train = self.root / "train"
        return train if train.is_dir() else self.root

    def _split_folders(self) -> dict[Split, str]:
        """The folder of each split, or nothing where hashes decide."""
        validation = next((name for name in VALIDATION_NAMES if (self.root / name).is_dir()), None)
        test = "test" if (self.root / "test").is_dir() else None
        if not (self.root / "train").is_dir() or not (validation or test):
            return {}
        return {"train": "train", "validation": validation or test, "test": test or validation}

    def _splits(self, path: str, folders: dict[Split, str]) -> set[Split]:
        if folders:
            return {split for split, folder in folders.items() if path.startswith(f"{folder}/")}
        digest = blake2b(os.fsencode(path), digest_size=8).digest()
        place = int.from_bytes(digest, "little") / 2**64
        if place < self.holdout:
            return {"test"}
        return {"validation"} if place < 2 * self.holdout else {"train"}

    def _classes(self) -> list[str]:
        return sorted(p.name for p in self._base().iterdir() if p.is_dir() and not p.name.startswith("."))

    def _classes_of(self, entries: list["_Entry"]) -> list[str | None]:
        level = 0 if self._base() == self.root else 1
        folders = [entry.path.split("/")[:-1] for entry in entries]
        return [names[level] if len(names) > level else None for names in folders]


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
        """Of pixels and labels."""
        digest = sha256(f"{tuple(self.pixels.shape[1:])}".encode())
        for rows in self.rows.split(1024):
            digest.update(memoryview(self.pixels.index_select(0, rows).numpy()))
        if self.labels is not None:
            digest.update(memoryview(self.labels.numpy()))
        return digest.hexdigest()


class StreamedFiles(ImageSet):
    """Files that are decoded whenever they are asked for.

    Args:
        root: folder that the paths are relative to.
        entries: the files, n of them.
        labels: int64 (n,) or None.
        image_size: height and width of the images given out.
        channels: 1 or 3.
        cache: folder of the index, in which a file that has broken since then is forgotten.
    """

    def __init__(
        self,
        root: Path,
        entries: list["_Entry"],
        labels: Tensor | None,
        image_size: int,
        channels: int,
        cache: Path,
    ):
        self.root = root
        self.entries = entries
        self.labels = labels
        self.image_size = image_size
        self.channels = channels
        self.cache = cache

    def __len__(self) -> int:
        return len(self.entries)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        chosen = torch.as_tensor(indices, dtype=torch.int64).tolist()
        images = torch.empty(len(chosen), self.channels, self.image_size, self.image_size, dtype=torch.uint8)
        for image, index in zip(images, chosen, strict=True):
            path = self.root / self.entries[index].path
            try:
                image.copy_(fit(decode(path.read_bytes(), self.channels), self.image_size))
            except Exception as error:
                forget(self.root, self.entries[index].path, self.cache)
                raise UserError(
                    f"{path} could be read when it was indexed and cannot be any more ({problem(error)}): "
                    "restore the file, or start again with data.on_error=skip"
                ) from error
        return images

    def fingerprint(self) -> str:
        """Of names, sizes and times of change, not of content: hashing that would mean reading it all."""
        digest = sha256(f"{(self.channels, self.image_size)}".encode())
        for path, _, record in self.entries:
            digest.update(os.fsencode(f"{path}\0{record.size}\0{record.changed}\0"))
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


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

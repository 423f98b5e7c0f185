"""Images of any size and format that are decoded once, checked, and then cached."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from hashlib import sha256
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from src.data.decode import problem
from src.data.folder_report import report_content, report_faults, report_sizes, some
from src.data.image_index import ImageFile, ImageIndex, Record
from src.data.source import ImageSet, ImageSource, Split, user_path
from src.errors import UserError


class Entry(NamedTuple):
    """A usable image.

    Attributes:
        path: see `ImageFile`.
        row: of the decoded pixels.
        record: what decoding it has shown.
    """

    path: str
    row: int
    record: Record


class Catalogue(NamedTuple):
    """Attributes:
    entries: the usable images of all splits.
    pixels: uint8 (N, C, H, W), the decoded images; None where they are decoded at every use.
    """

    entries: list[Entry]
    pixels: Tensor | None


class IndexedSource(ImageSource):
    """A source whose images are all decoded once before the first run, so that no run stops on a broken one.

    `src.data.decode` describes the conversion to pixels. An image is scaled until it covers image_size, then its
    centre is cropped. Arguments that `ImageSource` does not describe are described in `ImageFolder`.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        channels: int,
        num_classes: int,
        horizontal_flip: bool,
        holdout: float,
        min_size: int,
        on_error: str,
        white: float | None,
        memory_limit_mb: float,
        cache: str,
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
        self.holdout = holdout
        self.min_size = min_size
        self.on_error = on_error
        self.white = white
        self.memory_limit_mb = memory_limit_mb
        self.cache = user_path(cache, "data.cache") / self.name
        self._catalogue: Catalogue | None = None

    def prepare(self) -> None:
        """Indexes the images; the first time this decodes every one, in threads, with a progress bar."""
        if self._catalogue is None:
            self.check()
            self._catalogue = self._index()

    @property
    @abstractmethod
    def _where(self) -> str:
        """The option that names the images and its value, for messages."""

    @property
    @abstractmethod
    def _images(self) -> ImageIndex: ...

    @abstractmethod
    def _index(self) -> Catalogue: ...

    @abstractmethod
    def _splits(self, entry: Entry) -> set[Split]:
        """The splits that an image belongs to."""

    @abstractmethod
    def _label(self, path: str) -> int:
        """The class of an image; used only with num_classes > 0."""

    def _caption(self, path: str) -> str:
        """The caption of an image; used only if `captioned`."""
        raise NotImplementedError

    @abstractmethod
    def _report_empty(self, split: Split) -> None:
        """Warns, or raises a UserError, because a split has no images."""

    def _load(self, split: Split) -> ImageSet:
        self.prepare()
        entries = [entry for entry in self._catalogue.entries if split in self._splits(entry)]
        if not entries:
            self._report_empty(split)
        labels = captions = None
        if self.num_classes:
            labels = torch.tensor([self._label(entry.path) for entry in entries], dtype=torch.int64)
        if self.captioned:
            captions = [self._caption(entry.path) for entry in entries]
        if self._catalogue.pixels is None:
            return StreamedImages(self._images, entries, labels, captions)
        rows = torch.tensor([entry.row for entry in entries], dtype=torch.int64)
        return DecodedImages(self._catalogue.pixels, rows, labels, captions)

    def _examine(self, files: list[ImageFile], unusable: Mapping[str, str] | None = None) -> Catalogue:
        """Decodes the images that are new or have changed, and applies on_error.

        Args:
            files: the images.
            unusable: path -> why an image cannot be used although it may be decoded.

        Raises:
            UserError: there are faulty images and on_error is "stop", or no image is left.
        """
        in_memory = len(files) * prod(self.image_shape) <= self.memory_limit_mb * 2**20
        records, pixels = self._images.examine(files, in_memory)
        entries, faults = [], []
        row = 0  # of the pixels, which hold what could be decoded
        for file, record in zip(files, records, strict=True):
            fault = record.problem or (unusable or {}).get(file.path)
            if fault is None and min(record.width, record.height) < self.min_size:
                fault = f"{record.width}x{record.height} pixels"
            if fault is None:
                entries.append(Entry(file.path, row, record))
            else:
                faults.append(f"{file.path} ({fault})")
            row += record.problem is None
        if faults and (self.on_error == "stop" or not entries):
            fix = "set data.on_error=skip to leave them out" if entries else "no image is left"
            raise UserError(
                f"{len(faults)} of {len(records)} images in {self._where} cannot be used: {some(faults)}; {fix}"
            )
        images = {entry.path: entry.record for entry in entries}
        report_faults(faults, len(records))
        report_sizes(self._where, images, self.image_size, self.image_shape)
        report_content(self._where, images)
        return Catalogue(entries, pixels)


class DecodedImages(ImageSet):
    """Rows of one large tensor that all splits share.

    Args:
        pixels: uint8 (N, C, H, W).
        rows: int64 (n,), this set's rows.
        labels: int64 (n,) or None.
        captions: n texts or None.
    """

    def __init__(
        self, pixels: Tensor, rows: Tensor, labels: Tensor | None, captions: Sequence[str] | None = None
    ):
        self.pixels = pixels
        self.rows = rows
        self.labels = labels
        self.captions = captions

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        return self.pixels.index_select(0, self.rows[torch.as_tensor(indices, dtype=torch.int64)])

    def fingerprint(self) -> str:
        """A hash of the pixels, labels and captions."""
        digest = sha256(f"{tuple(self.pixels.shape[1:])}".encode())
        for rows in self.rows.split(1024):
            digest.update(memoryview(self.pixels.index_select(0, rows).numpy()))
        digest.update(self.annotations())
        return digest.hexdigest()


class StreamedImages(ImageSet):
    """Images that are decoded at every use.

    Args:
        index: of their set.
        entries: the images, n of them.
        labels: int64 (n,) or None.
        captions: n texts or None.
    """

    def __init__(
        self,
        index: ImageIndex,
        entries: list[Entry],
        labels: Tensor | None,
        captions: Sequence[str] | None = None,
    ):
        self.index = index
        self.entries = entries
        self.labels = labels
        self.captions = captions

    def __len__(self) -> int:
        return len(self.entries)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        chosen = torch.as_tensor(indices, dtype=torch.int64).tolist()
        images = torch.empty(len(chosen), *self.index.image_shape, dtype=torch.uint8)
        for image, i in zip(images, chosen, strict=True):
            path = self.entries[i].path
            try:
                image.copy_(self.index.decode(self.index.read(path)))
            except Exception as error:
                self.index.forget()
                raise UserError(
                    f"{self.index.full_name(path)} could be read when it was indexed and cannot be read now "
                    f"({problem(error)}): restore the file, or start again with data.on_error=skip"
                ) from error
        return images

    def fingerprint(self) -> str:
        """Of shape, labels, captions and the bytes of the images when they were indexed.

        Independent of names, places and times of change, so that a copy of the set has the same one.
        """
        digest = sha256(f"{(self.index.image_shape, self.index.white)}".encode())
        for entry in self.entries:
            digest.update(entry.record.digest.encode())
        digest.update(self.annotations())
        return digest.hexdigest()

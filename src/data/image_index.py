"""What decoding the images of a set shows: examined once, then cached.

The cache holds two kinds of files, each with a checksum: an index of records for each set, and the decoded pixels
for each set and image shape.
"""

import json
import os
import tempfile
import time
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b, sha256
from logging import getLogger
from math import prod
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL import __version__ as pillow_version
from rich.progress import track
from torch import Tensor

from src.data.decode import decode, fit, problem, verify
from src.errors import UserError

log = getLogger(__name__)

CACHE_VERSION = 2
"""Of the cache's form and of the conversion to pixels: files of another version are not read."""
DAY = 86_400


class ImageFile(NamedTuple):
    """An image as its storage shows it, before it is read.

    Attributes:
        path: its name within the set: of a file, the path below the root, with forward slashes.
        size: bytes; 0 if unknown.
        changed: time of the last change, in nanoseconds, or another number that changes with the content; 0 if
            unknown.
    """

    path: str
    size: int
    changed: int


class Record(NamedTuple):
    """What decoding a file has shown. Valid while the file's `size` and `changed` stay the same.

    Attributes:
        problem: why the file cannot be used, or None; if it cannot, what follows is undefined.
        width, height: in pixels, upright.
        frames: number of frames, of which the first is used.
        brightest: largest value after the conversion to 8 bits where the file has more bits, else None.
        digest: hash of the file's bytes, hexadecimal.
    """

    size: int
    changed: int
    problem: str | None
    width: int = 0
    height: int = 0
    frames: int = 1
    brightest: int | None = None
    digest: str = ""


@dataclass(frozen=True, kw_only=True)
class ImageIndex(ABC):
    """What is known of the images of a set, and the cache in which it is kept.

    Attributes:
        cache: folder of the cache.
        image_shape: (C, H, W) of decoded images.
        white: see `decode`.
    """

    cache: Path
    image_shape: tuple[int, int, int]
    white: float | None = None

    @property
    @abstractmethod
    def place(self) -> str:
        """Where the images are stored: distinguishes sets in the cache."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The encoded image of this path; raises anything if there is none."""

    def full_name(self, path: str) -> str:
        """The image of this path in messages."""
        return path

    def examine(self, files: list[ImageFile], in_memory: bool) -> tuple[list[Record], Tensor | None]:
        """Decodes each file that is new or has changed since the last time; shows progress.

        Args:
            files: the images; each path once.
            in_memory: whether to return the decoded images.

        Returns:
            a record for each file, and uint8 (n, C, H, W) with the n files that have no problem, in their
            order, as a mapped file that processes share; None if not `in_memory`.

        Raises:
            UserError: if the cache cannot be written.
        """
        known = _read_index(self._index_file)
        records = [known.get(file.path) for file in files]
        for row, (file, record) in enumerate(zip(files, records, strict=True)):
            if record and (record.size, record.changed) != (file.size, file.changed):
                records[row] = None
        series = _digest(self.place, self.image_shape, self.white)
        pixel_file = self.cache / f"{series}-{_digest(files)}.pixels"
        if None not in records:
            pixels = self._read_pixels(pixel_file, records) if in_memory else None
            if pixels is not None or not in_memory:
                return records, pixels
        with _writable(self.cache):
            if not in_memory:
                self._examine_rows(files, records, None)
                return records, None
            with _replacing(pixel_file) as store:
                self._examine_rows(files, records, store)
            for stale in self.cache.glob(f"{series}-*.pixels"):
                if stale != pixel_file:
                    stale.unlink(missing_ok=True)
        return records, self._read_pixels(pixel_file, records)

    def forget(self) -> None:
        """Removes the index, so that the next `examine` decodes every file."""
        with suppress(OSError):
            self._index_file.unlink(missing_ok=True)

    def decode(self, content: bytes) -> Tensor:
        """uint8 (C, H, W) from a file's bytes; raises what `decode` raises."""
        channels, height, width = self.image_shape
        return fit(decode(content, channels, self.white), height, width)

    @property
    def _index_file(self) -> Path:
        return self.cache / f"{_digest(self.place, self.white)}.index"

    def _examine_rows(
        self, files: list[ImageFile], records: list[Record | None], store: BinaryIO | None
    ) -> None:
        """Fills in the records; into `store` go the pixels of all files, and their checksum."""
        todo = [row for row, record in enumerate(records) if store is not None or record is None]
        crc = 0

        def look(row: int) -> tuple[Record, bytes]:
            return self._examine(files[row], store is not None)

        try:
            with ThreadPool() as pool, warnings.catch_warnings():
                # Large images are accepted up to the size that Pillow refuses.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                results = pool.imap(look, todo, chunksize=8)
                hidden = len(todo) < 1000
                progress = track(results, "Checking images", len(todo), transient=True, disable=hidden)
                for row, (record, pixels) in zip(todo, progress, strict=True):
                    records[row] = record
                    if store is not None:
                        store.write(pixels)
                        crc = zlib.crc32(pixels, crc)
        finally:  # when interrupted too, so that the next start continues there
            seen = {file.path: record for file, record in zip(files, records, strict=True) if record}
            _write_index(self._index_file, seen)
        if store is not None:
            store.write(crc.to_bytes(4))

    def _examine(self, file: ImageFile, in_memory: bool) -> tuple[Record, bytes]:
        """The file's record, and its pixels if `in_memory` and it has no problem."""
        channels, height, width = self.image_shape
        try:
            content = self.read(file.path)
            if not content:
                raise ValueError("empty file")
            header = verify(content)
            image = decode(content, channels, self.white)
            pixels = fit(image, height, width).numpy().tobytes() if in_memory else b""
        except MemoryError:
            raise
        # A damaged file can make a decoder raise anything.
        except Exception as error:
            # An error of the disk or network may be gone the next time: no file has this size.
            passing = isinstance(error, OSError) and error.errno is not None
            return Record(-1 if passing else file.size, file.changed, problem(error)), b""
        brightest = int(np.asarray(image).max()) if header.bits > 8 else None
        digest = blake2b(content, digest_size=8).hexdigest()
        return Record(file.size, file.changed, None, *image.size, header.frames, brightest, digest), pixels

    def _read_pixels(self, path: Path, records: list[Record]) -> Tensor | None:
        """The pixels of all records without a problem; None if the file is missing or damaged."""
        shape = (sum(record.problem is None for record in records), *self.image_shape)
        try:
            # Copy-on-write: processes on one machine share the pages, and torch wants writable arrays.
            content = np.memmap(path, np.uint8, mode="c")
        except FileNotFoundError:
            return None
        except (OSError, ValueError):  # ValueError: an empty file
            content = np.empty(0, np.uint8)
        pixels, crc = content[: prod(shape)], content[prod(shape) :].tobytes()
        if len(pixels) != prod(shape) or crc != zlib.crc32(pixels).to_bytes(4):
            log.warning("%s is unreadable or damaged: its images are decoded again", path)
            return None
        return torch.from_numpy(pixels.reshape(shape))


def read_file(path: Path) -> bytes:
    """The content of a file.

    Raises:
        ValueError: it is missing, or of a kind that cannot be read like a file.
        OSError: it cannot be read.
    """
    if not path.is_file():  # reading a pipe would wait forever
        raise ValueError(
            "not a regular file" if path.exists() else "dangling link" if path.is_symlink() else "missing"
        )
    return path.read_bytes()


def _digest(*parts: object) -> str:
    # Another version of Pillow may decode and resize differently.
    return sha256(json.dumps((CACHE_VERSION, pillow_version, *parts)).encode()).hexdigest()[:16]


@contextmanager
def _writable(cache: Path) -> Iterator[None]:
    """Reports an OSError of the block as one of the cache; removes what killed processes left there."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for partial in cache.glob("*.partial"):
            with suppress(FileNotFoundError):
                if partial.stat().st_mtime < time.time() - DAY:
                    partial.unlink()
        yield
    except OSError as error:
        raise UserError(
            f"data.cache={cache} cannot be written ({error.strerror or error}): "
            "set data.cache to a folder with room"
        ) from error


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which replaces `path` if the block ends without an exception."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _read_index(path: Path) -> dict[str, Record]:
    try:
        crc, content = path.read_bytes().split(b"\n")
        if int(crc) != zlib.crc32(content):
            raise ValueError("checksum")
        return {name: Record(*values) for name, values in json.loads(content).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        log.warning("%s is unreadable or damaged: its images are checked again", path)
        return {}


def _write_index(path: Path, records: dict[str, Record]) -> None:
    content = json.dumps(records).encode()
    with _replacing(path) as file:
        file.write(b"%d\n%b" % (zlib.crc32(content), content))

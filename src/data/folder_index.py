"""Which files of a folder are images, and what decoding them shows: examined once, then cached.

The cache holds two kinds of files, each with a checksum: an index of records for each folder, and the decoded
pixels for each folder and image shape.
"""

import json
import os
import tempfile
import time
import warnings
import zlib
from collections import Counter, deque
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

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
CACHE_VERSION = 2
"""Of the cache's form and of the conversion to pixels: files of another version are not read."""
DAY = 86_400


class ImageFile(NamedTuple):
    """A file as the file system shows it.

    Attributes:
        path: below the root, with forward slashes.
        size: bytes; 0 if unknown.
        changed: time of the last change, in nanoseconds; 0 if unknown.
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


class Listing(NamedTuple):
    """Attributes:
    files: sorted by path.
    others: number of files left out, by extension.
    repeated: number of links left out because they lead to a file that is in the list already.
    """

    files: list[ImageFile]
    others: Counter
    repeated: int


def list_images(root: Path, starts: list[Path]) -> Listing:
    """The image files in the folders `starts` below `root` and in those below them, except hidden ones.

    Links are followed after everything that is not a link, so that a file belongs to the folder that it lies
    in. No folder is entered twice and no file listed twice, so circles of links end.

    Raises:
        UserError: if a folder cannot be read.
    """
    folders, linked_folders, links = deque(starts), deque(), []
    entered, found, others = set(), {}, Counter()  # found: real path -> path
    while folders or linked_folders:
        folder = folders.popleft() if folders else linked_folders.popleft()
        real = os.path.realpath(folder)
        if real in entered:
            continue
        entered.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"data.root: {printable(folder)} cannot be read ({error.strerror})") from error
        for entry in entries:
            extension = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                continue
            if is_folder(entry):
                (linked_folders if entry.is_symlink() else folders).append(entry.path)
            elif extension not in EXTENSIONS:
                others[extension] += 1
            elif entry.is_symlink():
                links.append(entry.path)
            else:
                found[os.path.join(real, entry.name)] = entry.path
    count = len(found) + len(links)
    for path in links:
        found.setdefault(os.path.realpath(path), path)
    files = sorted(_image_file(root, path) for path in found.values())
    return Listing(files, others, count - len(files))


@dataclass(frozen=True)
class FolderIndex:
    """What is known of the image files in a folder, and the cache in which it is kept.

    Attributes:
        root: folder that the files' paths are relative to.
        cache: folder of the cache.
        image_shape: (C, H, W) of decoded images.
        white: see `decode`.
    """

    root: Path
    cache: Path
    image_shape: tuple[int, int, int]
    white: float | None = None

    def examine(self, files: list[ImageFile], in_memory: bool) -> tuple[list[Record], Tensor | None]:
        """Decodes each file that is new or has changed since the last time; shows progress.

        Args:
            files: from `list_images`.
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
        series = _digest(os.path.realpath(self.root), self.image_shape, self.white)
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
        return self.cache / f"{_digest(os.path.realpath(self.root), self.white)}.index"

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
        path = self.root / file.path
        channels, height, width = self.image_shape
        try:
            if not path.is_file():  # reading a pipe would wait forever
                raise ValueError("not a regular file" if path.exists() else "dangling link")
            content = path.read_bytes()
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


def printable(path: str | Path) -> str:
    """A path in characters that every log can write: bytes that are not UTF-8 appear as backslash escapes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder or a link to one; a system call for links only, unlike Path.is_dir."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _image_file(root: Path, path: str) -> ImageFile:
    name = Path(path).relative_to(root).as_posix()
    try:
        status = os.stat(path)
    except OSError:  # the reason is found when the file is examined
        return ImageFile(name, 0, 0)
    return ImageFile(name, status.st_size, status.st_mtime_ns)


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

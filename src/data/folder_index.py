"""Which files of a folder are images, and whether each can be decoded: found out once, then remembered."""

import json
import os
import shutil
import stat
import tempfile
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL import __version__ as pillow_version
from rich.progress import track
from torch import Tensor

from src.data.decode import decode, fit, problem, verify
from src.errors import UserError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


class ImageFile(NamedTuple):
    """A file as the file system shows it.

    Attributes:
        path: below the root, with forward slashes.
        size: bytes.
        changed: time of the last change, in nanoseconds.
        problem: why it cannot even be opened, or None.
    """

    path: str
    size: int
    changed: int
    problem: str | None


class Record(NamedTuple):
    """What decoding a file has shown, in pixels; it holds while `size` and `changed` stay the same."""

    size: int
    changed: int
    width: int
    height: int
    problem: str | None


class Listing(NamedTuple):
    """Attributes:
    files: sorted by path.
    others: how many files of which other extension were left out.
    repeated: how many links led to a file that is in the list already.
    """

    files: list[ImageFile]
    others: Counter
    repeated: int


def list_images(root: Path, starts: list[Path]) -> Listing:
    """The image files in the folders `starts` below `root` and in those below them, hidden ones excepted.

    Links are followed after all that is not a link, so that a file belongs to the folder that it lies in. No
    folder is entered and no file listed twice: circles of links end.

    Raises:
        UserError: if a folder cannot be read.
    """
    pending, linked_folders, linked_files = deque(starts), deque(), deque()
    entered, real_files, paths, others, repeated = set(), set(), [], Counter(), 0
    while pending or linked_folders:
        folder = pending.popleft() if pending else linked_folders.popleft()
        real = os.path.realpath(folder)
        if real in entered:
            continue
        entered.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"data.root: {folder} cannot be read ({error.strerror})") from error
        for entry in entries:
            extension = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path):
                (linked_folders if entry.is_symlink() else pending).append(entry.path)
            elif extension not in EXTENSIONS:
                others[extension] += 1
            elif entry.is_symlink():
                linked_files.append(entry.path)
            else:
                paths.append(entry.path)
                real_files.add(os.path.join(real, entry.name))
    for path in linked_files:
        real = os.path.realpath(path)
        if real in real_files:
            repeated += 1
        else:
            paths.append(path)
            real_files.add(real)
    files = sorted(_image_file(root, path) for path in paths)
    return Listing(files, others, repeated)


def examine(
    root: Path, files: list[ImageFile], cache: Path, image_size: int, channels: int, in_memory: bool
) -> tuple[list[Record], Tensor | None]:
    """Decodes each file that is new or changed since the last time; shows progress.

    Args:
        root: folder that the files' paths are relative to.
        files: from `list_images`.
        cache: folder for the index and the pixels.
        image_size: of `pixels`.
        channels: of `pixels`.
        in_memory: whether to keep the decoded images.

    Returns:
        a record for each file, and uint8 (n, channels, image_size, image_size), a row for each file
        (undefined for faulty ones), or None if not `in_memory`.

    Raises:
        UserError: if the cache cannot be written.
    """
    index_file = _index_file(root, cache)
    known = _read_index(index_file)
    records = [_remembered(known, file) for file in files]
    series = _digest(os.path.realpath(root), image_size, channels)
    pixel_file = cache / f"{series}-{_digest(files)}.npy"
    complete = all(record is not None for record in records)
    if in_memory and complete and pixel_file.exists():
        return records, _mapped(pixel_file)
    if not in_memory and complete:
        return records, None

    todo = [row for row, record in enumerate(records) if in_memory or record is None]
    shape = (len(files), channels, image_size, image_size)
    fleeting = set()
    with _writable(cache), _pixel_store(cache, shape if in_memory else None) as store:

        def examine_row(row: int) -> tuple[Record, bool]:
            return _examine(root, files[row], channels, image_size, None if store is None else store[row])

        try:
            with ThreadPool() as pool, warnings.catch_warnings():
                # Large is no fault; only what Pillow refuses is.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                results = pool.imap(examine_row, todo, chunksize=8)
                progress = track(
                    results, "Checking images", len(todo), transient=True, disable=len(todo) < 1000
                )
                for row, (record, lasts) in zip(todo, progress, strict=True):
                    records[row] = record
                    if not lasts:
                        fleeting.add(row)
        finally:
            # Also when interrupted: what has been seen need not be seen again.
            rows = [row for row, record in enumerate(records) if record is not None and row not in fleeting]
            _write_index(index_file, {files[row].path: records[row] for row in rows})
        if store is None:
            return records, None
        if fleeting:
            return records, torch.from_numpy(store)
        store.flush()
        for stale in cache.glob(f"{series}-*.npy"):
            stale.unlink()
        os.replace(store.filename, pixel_file)
    return records, _mapped(pixel_file)


def forget(root: Path, path: str, cache: Path) -> None:
    """Has a file decoded anew by the next `examine`, even if its size and time of change stay the same.

    Args:
        root: as for `examine`.
        path: of the file, below the root.
        cache: as for `examine`; where it cannot be written, nothing is forgotten.
    """
    index_file = _index_file(root, cache)
    known = _read_index(index_file)
    if known.pop(path, None) is not None:
        with suppress(OSError):
            _write_index(index_file, known)


def _index_file(root: Path, cache: Path) -> Path:
    return cache / f"{_digest(os.path.realpath(root))}.json"


def _image_file(root: Path, path: str) -> ImageFile:
    name = Path(path).relative_to(root).as_posix()
    try:
        status = os.stat(path)
    except OSError as error:
        dangling = os.path.islink(path) and isinstance(error, FileNotFoundError)
        return ImageFile(name, 0, 0, "dangling link" if dangling else str(error.strerror).lower())
    if not stat.S_ISREG(status.st_mode):
        return ImageFile(name, 0, 0, "not a regular file")
    return ImageFile(name, status.st_size, status.st_mtime_ns, None if status.st_size else "empty file")


def _examine(
    root: Path, file: ImageFile, channels: int, image_size: int, pixels: np.ndarray | None
) -> tuple[Record, bool]:
    """The file's record, and whether it lasts: an error of the disk or network may be gone the next time."""
    if file.problem is not None:
        return Record(file.size, file.changed, 0, 0, file.problem), True
    try:
        content = (root / file.path).read_bytes()
        verify(content)
        image = decode(content, channels)
        if pixels is not None:
            pixels[:] = fit(image, image_size).numpy()
    except MemoryError:
        raise
    # Whatever else a damaged file makes a decoder raise is that file's problem.
    except Exception as error:
        lasts = not (isinstance(error, OSError) and error.errno is not None)
        return Record(file.size, file.changed, 0, 0, problem(error)), lasts
    return Record(file.size, file.changed, *image.size, None), True


def _remembered(known: dict[str, Record], file: ImageFile) -> Record | None:
    if file.problem is not None:
        return Record(file.size, file.changed, 0, 0, file.problem)
    record = known.get(file.path)
    return record if record is not None and record[:2] == (file.size, file.changed) else None


def _digest(*parts: object) -> str:
    # Another Pillow may decode and resize otherwise.
    return sha256(json.dumps((pillow_version, *parts)).encode()).hexdigest()[:16]


def _mapped(pixel_file: Path) -> Tensor:
    # Copy-on-write: processes on one machine share the pages, and torch wants arrays that it may write to.
    return torch.from_numpy(np.load(pixel_file, mmap_mode="c"))


@contextmanager
def _writable(cache: Path) -> Iterator[None]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"data.cache={cache} cannot be written ({error.strerror or error}): "
            "set data.cache to a folder with room"
        ) from error


@contextmanager
def _pixel_store(cache: Path, shape: tuple[int, ...] | None) -> Iterator[np.memmap | None]:
    if shape is None:
        yield None
        return
    needed, free = int(np.prod(shape)), shutil.disk_usage(cache).free
    if needed > free:
        # Writing to a mapped file on a full disk would kill the process without a word.
        raise OSError(f"{needed >> 20} MB needed, {free >> 20} MB free")
    handle, name = tempfile.mkstemp(dir=cache, suffix=".partial")
    os.close(handle)
    try:
        yield np.lib.format.open_memmap(name, mode="w+", dtype=np.uint8, shape=shape)
    finally:
        Path(name).unlink(missing_ok=True)


def _read_index(path: Path) -> dict[str, Record]:
    try:
        return {name: Record(*values) for name, values in json.loads(path.read_bytes()).items()}
    # No index, or one of another form: every file is looked at afresh.
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_index(path: Path, records: dict[str, Record]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    with os.fdopen(handle, "w") as file:
        json.dump(records, file)
    os.replace(name, path)

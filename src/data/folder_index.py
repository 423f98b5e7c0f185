"""Which files of a folder are images."""

import os
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from src.data.image_index import ImageFile, ImageIndex, read_file
from src.errors import UserError

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


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


@dataclass(frozen=True, kw_only=True)
class FolderIndex(ImageIndex):
    """What is known of the image files in a folder.

    Attributes:
        root: folder that the files' paths are relative to.
    """

    root: Path

    @property
    def place(self) -> str:
        return os.path.realpath(self.root)

    def read(self, path: str) -> bytes:
        return read_file(self.root / path)

    def full_name(self, path: str) -> str:
        return printable(self.root / path)


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

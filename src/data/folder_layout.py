"""Which split and which class an image file belongs to, by its path."""

import os
from hashlib import blake2b
from pathlib import Path

from src.data.folder_index import is_folder, printable
from src.data.source import Split
from src.errors import UserError

SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


class FolderLayout:
    """The subfolders that mean something; `src.data.image_folder.ImageFolder` documents the rules.

    Args:
        root: a readable folder; its subfolders are listed here, once.

    Attributes:
        split_folders: the name of each split's folder; empty where hashes decide.
        classes: names of the class folders in the order of their labels.
        starts: the folders in which images are looked for.

    Raises:
        UserError: if a split has several folders.
    """

    def __init__(self, root: Path):
        found: dict[Split, str] = {}
        for folder in _subfolders(root):
            for split, names in SPLIT_FOLDERS.items():
                if folder.lower() in names and found.setdefault(split, folder) != folder:
                    raise UserError(
                        f"data.root={printable(root)} has several folders for {split} "
                        f"({found[split]}, {folder}): keep one"
                    )
        train, validation, test = (found.get(split) for split in SPLIT_FOLDERS)
        self.split_folders: dict[Split, str] = {}
        if train and (validation or test):
            self.split_folders = {
                "train": train,
                "validation": validation or test,
                "test": test or validation,
            }
        base = root / (train or "")
        self._class_level = 1 if train else 0
        self.classes = _subfolders(base)
        self.starts = [root / name for name in sorted(set(self.split_folders.values()))] or [base]

    def splits(self, path: str, holdout: float) -> set[Split]:
        """The splits that a file belongs to, by its path below the root."""
        if self.split_folders:
            return {split for split, folder in self.split_folders.items() if path.startswith(f"{folder}/")}
        digest = blake2b(os.fsencode(path), digest_size=8).digest()
        return {held_out(int.from_bytes(digest, "little"), holdout)}

    def class_of(self, path: str) -> str | None:
        """The name of the class folder that a file lies in, by its path below the root."""
        folders = path.split("/")[:-1]
        return folders[self._class_level] if len(folders) > self._class_level else None


def held_out(hash: int, holdout: float) -> Split:
    """The split of an image whose hash of 64 bits is `hash`, with a share of `holdout` in validation and in test."""
    place = hash / 2**64
    if place < holdout:
        return "test"
    return "validation" if place < 2 * holdout else "train"


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:  # several times faster than Path.iterdir in folders of many files
        return sorted(entry.name for entry in entries if is_folder(entry) and entry.name[0] != ".")

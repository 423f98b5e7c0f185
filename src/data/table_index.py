"""Images in the rows of Hugging Face tables."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from src.data.image_index import ImageFile, ImageIndex, read_file

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class TableIndex(ImageIndex):
    """What is known of the images in a column of tables.

    Attributes:
        source: name of the tables in the cache.
        column: holds encoded images: bytes, or a dictionary of bytes or the path of a local file.
        tables: by the names of splits.
    """

    source: str
    column: str
    tables: dict[str, "Dataset"]

    @property
    def place(self) -> str:
        return self.source

    def files(self) -> list[ImageFile]:
        """All rows of the tables. They count as changed when a file of their table changes."""
        found = []
        for name, table in self.tables.items():
            parts = [(path, os.stat(path)) for path in (part["filename"] for part in table.cache_files)]
            key = repr([(path, status.st_size, status.st_mtime_ns) for path, status in parts])
            changed = int.from_bytes(blake2b(key.encode(), digest_size=7).digest())
            found += [ImageFile(path_of(name, i), 0, changed) for i in range(len(table))]
        return found

    def read(self, path: str) -> bytes:
        content = self.tables[split_of(path)][int(path.rpartition(" ")[2])][self.column]
        if isinstance(content, Mapping):
            file, content = content.get("path"), content.get("bytes")
            if content is None and file is not None:
                return read_file(Path(file))  # never an address of the network
        if content is None:
            raise ValueError("no image")
        if not isinstance(content, bytes):
            raise ValueError(f"no encoded image but {type(content).__name__}")
        return content

    def full_name(self, path: str) -> str:
        return f"{self.source}: {path}"


def path_of(split: str, row: int) -> str:
    """The name of an image: "train row 3"."""
    return f"{split} row {row}"


def split_of(path: str) -> str:
    """The split in the name of an image."""
    return path.rpartition(" row ")[0]

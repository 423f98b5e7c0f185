"""Loads files of tensors and primitives, which may be untrusted."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST_PARTS = 1_000_000
"""Of lists and dictionaries. A file of 1 kB can hold a list of 2^40 parts, since a pickle may repeat references."""
DEEPEST = 40


def load_tensors(path: Path, mapped: bool) -> Any:
    """The content of a file written by `torch.save`, on the CPU; code in it is not executed.

    Args:
        path: the file.
        mapped: whether tensors are mapped from the file, not copied. The file must then stay where it is.

    Raises:
        Exception: whatever torch raises for another file; ValueError if the content would be larger than the file, or
            has too many or too deeply nested parts.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as file:
        if any(entry.file_size > size for entry in file.infolist()):
            raise ValueError("it is compressed")
    mapped &= os.fsencode(path) == str(path).encode(errors="replace")  # torch maps no file with another name
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    todo, parts = [(content, 0)], 0
    while todo:
        value, depth = todo.pop()
        parts += 1
        if parts > MOST_PARTS or depth > DEEPEST:
            raise ValueError("too many or too deeply nested parts")
        if isinstance(value, Mapping):
            todo += [(part, depth + 1) for part in value.values()]
        elif isinstance(value, list | tuple | set):
            todo += [(part, depth + 1) for part in value]
        elif isinstance(value, Tensor) and (value.layout is not torch.strided or value.nbytes > size):
            raise ValueError(f"a tensor of {tuple(value.shape)} in a file of {size:,} bytes")
    return content

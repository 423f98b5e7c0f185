"""Atomic file writes, checked reads, and the sidecar file with a checkpoint's size and hash."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

from annotated_types import Ge, Lt

from src.errors import UserError

T = TypeVar("T")

CHUNK = 1 << 20
LARGEST_JSON = 1 << 24
"""Bytes. A larger JSON file is none of ours."""
CHECKSUM = "checksum"
"""The entry of a JSON object with the hash of its other entries."""

Count = Annotated[int, Ge(0), Lt(1 << 62)]


class Damaged(UserError):
    """A file is not what was written: truncated, altered, or of another kind."""


@dataclass(frozen=True)
class Sidecar:
    """The sidecar of a checkpoint, stored in <checkpoint>.json.

    Attributes:
        size: size of the checkpoint file in bytes.
        sha256: SHA-256 of the checkpoint file, hexadecimal.
        step: number of optimiser steps.
        samples: training samples consumed, over all devices; None if the data module does not count them.
        world_size: number of processes.
        data: fingerprint of the training set; None if unknown.
    """

    size: Count
    sha256: str
    step: Count
    samples: Count | None = None
    world_size: Count = 1
    data: str | None = None


def sidecar_path(checkpoint: Path) -> Path:
    """The path of a checkpoint's sidecar."""
    return checkpoint.with_name(f"{checkpoint.name}.json")


def damage(checkpoint: Path) -> str | None:
    """A description of what is wrong with a checkpoint file; None if it is intact.

    A file without a sidecar (after a kill between the two writes, or copied alone) is checked by loading it.
    """
    try:
        record = read_json(sidecar_path(checkpoint), Sidecar)
    except FileNotFoundError:
        return _unloadable(checkpoint)
    except Damaged as error:
        return str(error)
    found = checkpoint.stat().st_size
    if found != record.size:
        return f"it has {found:,} bytes of {record.size:,}"
    if file_sha256(checkpoint) != record.sha256:
        return "its bytes have changed since they were written"
    return None


def _unloadable(checkpoint: Path) -> str | None:
    from src.runs.tensors import load_tensors

    try:
        load_tensors(checkpoint, mapped=True)
    except Exception as error:
        return f"it cannot be loaded ({str(error).partition(chr(10))[0][:120] or type(error).__name__})"
    return None


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    digest = sha256()
    with open_regular(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(content: Any, length: int = 8) -> str:
    """A short hexadecimal hash of JSON-serialisable content, for names of folders and caches."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:length]


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading.

    Raises:
        Damaged: it is a pipe, a device or a folder. Reading a pipe would wait forever.
        OSError: it does not exist or cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Damaged(f"{path} is not a regular file")
    return os.fdopen(handle, "rb")


def read_json(path: Path, schema: type[T]) -> T:
    """The content of a JSON file, as written by `write_json`.

    Args:
        path: the file.
        schema: a dataclass, a TypedDict or a type such as dict[str, float]; checked strictly.

    Raises:
        FileNotFoundError: the file does not exist.
        Damaged: it cannot be read, is larger than `LARGEST_JSON`, is no JSON of this schema, or was altered.
    """
    from pydantic import ValidationError

    try:
        with open_regular(path) as file:
            text = file.read(LARGEST_JSON + 1)
        if len(text) > LARGEST_JSON:
            raise Damaged(f"{path} is damaged: it is larger than {LARGEST_JSON:,} bytes")
        content = json.loads(text)
        if isinstance(content, dict) and CHECKSUM in content:
            checksum = content.pop(CHECKSUM)
            if checksum != digest_of(content, 16):
                raise Damaged(f"{path} is damaged: its content has changed since it was written")
        return _adapter(schema).validate_python(content, strict=not is_dataclass(schema))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise Damaged(f"{path} is damaged: {where}: {first['msg'].lower()}") from None
    except (ValueError, RecursionError):
        raise Damaged(f"{path} is damaged: it is not JSON") from None


@cache
def _adapter(schema: Any) -> Any:
    """Checks values against a type; making it takes longer than reading a file."""
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes indented JSON with a checksum, atomically; creates the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**content, CHECKSUM: digest_of(content, 16)}
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file by renaming a temporary one, and flushes file and folder to disk.

    If the process is killed, the path holds either the previous or the complete new content.
    """
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that replaces `path` when the block ends, after flushing it to disk; removed after an exception."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:  # x follows no link
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename durable
    finally:
        os.close(folder)

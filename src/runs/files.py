"""Files that survive kills: atomic writes, and the record beside a checkpoint that proves it is intact."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

CHUNK = 1 << 20


@dataclass(frozen=True)
class Sidecar:
    """The record beside a checkpoint, in <checkpoint>.json.

    Attributes:
        size: bytes of the checkpoint file.
        sha256: of the checkpoint file, hexadecimal.
        step: optimiser steps taken.
        samples: training samples consumed, over all devices; None where the data module does not count them.
        world_size: number of processes.
        data: fingerprint of the training set; None where it is unknown.
    """

    size: int
    sha256: str
    step: int
    samples: int | None
    world_size: int
    data: str | None

    def as_json(self) -> str:
        """The record as it is stored."""
        return json.dumps(asdict(self), indent=2) + "\n"


def sidecar_path(checkpoint: Path) -> Path:
    """The path of a checkpoint's record."""
    return checkpoint.with_name(f"{checkpoint.name}.json")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint file, in words; None if it is intact.

    A file without a record (killed between the two writes, or copied alone) is checked by loading it.
    """
    try:
        record = json.loads(sidecar_path(checkpoint).read_text())
        size, digest = record["size"], record["sha256"]
    except FileNotFoundError:
        return _unloadable(checkpoint)
    except (ValueError, KeyError, TypeError, OSError):
        return f"{sidecar_path(checkpoint).name} is not readable"
    found = checkpoint.stat().st_size
    if found != size:
        return f"it has {found:,} bytes of {size:,}"
    if file_sha256(checkpoint) != digest:
        return "its bytes have changed since they were written"
    return None


def _unloadable(checkpoint: Path) -> str | None:
    import torch

    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:
        return f"it cannot be loaded ({str(error).splitlines()[0][:120]})"
    return None


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, hexadecimal."""
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(content: Any, length: int = 8) -> str:
    """A short hexadecimal hash of anything that JSON can hold, for names of folders and caches."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:length]


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON atomically; makes the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that a kill leaves either as it was or complete, and flushes it and its folder to disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


@contextmanager
def forgiving(what: str) -> Iterator[None]:
    """Logs an OSError of the block (a full disk, say) instead of ending the training."""
    try:
        yield
    except OSError as error:
        log.error("%s: %s; training continues", what, error.strerror or error)

"""Atomic file writes, and the sidecar file with a checkpoint's size and hash."""

import json
import os
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


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

    size: int
    sha256: str
    step: int
    samples: int | None
    world_size: int
    data: str | None

    def as_json(self) -> str:
        """The sidecar as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"


def sidecar_path(checkpoint: Path) -> Path:
    """The path of a checkpoint's sidecar."""
    return checkpoint.with_name(f"{checkpoint.name}.json")


def damage(checkpoint: Path) -> str | None:
    """A description of what is wrong with a checkpoint file; None if it is intact.

    A file without a sidecar (after a kill between the two writes, or copied alone) is checked by loading it.
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
    """The SHA-256 of a file, hexadecimal."""
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(content: Any, length: int = 8) -> str:
    """A short hexadecimal hash of JSON-serialisable content, for names of folders and caches."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:length]


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON atomically; creates the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file by renaming a temporary one, and flushes file and folder to disk.

    If the process is killed, the path holds either the previous or the complete new content.
    """
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
        os.fsync(folder)  # makes the rename durable
    finally:
        os.close(folder)

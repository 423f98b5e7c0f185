"""What is written beside a checkpoint file, and whether the file is still what was written."""

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

CHUNK = 1 << 20


@dataclass(frozen=True)
class Sidecar:
    """The record beside a checkpoint, in <checkpoint>.json.

    Attributes:
        size: bytes of the checkpoint file.
        sha256: of the checkpoint file, hexadecimal.
        step: optimiser steps taken.
        samples: training samples consumed, over all devices.
        world_size: number of processes.
        data: fingerprint of the training set.
    """

    size: int
    sha256: str
    step: int
    samples: int
    world_size: int
    data: str

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def sidecar_path(checkpoint: Path) -> Path:
    """Where the record of a checkpoint file lies."""
    return checkpoint.with_name(f"{checkpoint.name}.json")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint file, in words; None if it is what was written.

    A file without a record (killed between the two, or copied alone) is judged by loading it.
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


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, hexadecimal."""
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _unloadable(checkpoint: Path) -> str | None:
    import torch

    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:
        return f"it cannot be loaded ({str(error).splitlines()[0][:120]})"
    return None

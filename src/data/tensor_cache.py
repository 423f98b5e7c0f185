"""Tensors that take long to compute, kept in files with a checksum."""

import os
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from logging import getLogger
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

log = getLogger(__name__)


def cached(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in a file, mapped into memory; computed and stored if the file is missing or damaged.

    A file that cannot be written is reported, and the computed tensors are returned.

    Args:
        path: the file; its name must identify the content.
        make: computes the tensors.
    """
    found = _read(path)
    if found is not None:
        return found
    made = {name: tensor.contiguous() for name, tensor in make().items()}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(made, unfinished, metadata={"sha256": _checksum(made)})
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        log.warning("%s cannot be written (%s): it will be computed again next time", path, error)
        return made
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return _read(path) or made


def _read(path: Path) -> dict[str, Tensor] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            expected = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        expected = None
    if expected is None or _checksum(tensors) != expected:
        log.warning("%s is damaged: it is computed again", path)
        return None
    return tensors


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()

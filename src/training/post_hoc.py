"""Post-hoc averages of any length from stored snapshots (Karras et al. 2024, arXiv:2312.02696, sec. 3.2).

The power-function average at step n has the profile p(t) = (gamma + 1) t^gamma / n^(gamma + 1) over the steps t in
[0, n]. A linear combination of the stored profiles approximates the requested one in the least-squares sense; the same
combination of the stored weights approximates the requested average.
"""

import json
import logging
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised
from torch import Tensor

from src.errors import UserError
from src.runs.files import write_atomically

log = logging.getLogger(__name__)

# In the run folder.
FOLDER = "ema"
# The relative standard deviation of gamma = 0, the plain mean of all steps.
LARGEST_STD = 12**-0.5


def exponent(std: float) -> float:
    """gamma of the profile with this relative standard deviation (app. C).

    std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic with one root gamma >= 0.

    Raises:
        ValueError: std is not in (0, 0.288].
    """
    if not 0 < std <= LARGEST_STD:
        raise ValueError(f"stds must be in (0, {LARGEST_STD:.3f}], got {std}")
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return max(roots.real.max().item(), 0.0)


def coefficients(stored: Sequence[tuple[float, float]], wanted: tuple[float, float]) -> np.ndarray:
    """Coefficients of the combination of stored averages that is closest to the requested one (app. C).

    Args:
        stored: (step, gamma) of each stored average.
        wanted: (step, gamma) of the requested average; no stored step should be later.

    Returns:
        float64, one coefficient per stored average.
    """
    steps, gammas = np.array(stored, dtype=np.float64).T
    among = _inner_product(steps[:, None], gammas[:, None], steps, gammas)
    with_wanted = _inner_product(steps, gammas, *wanted)
    # lstsq, since profiles of neighbouring snapshots are nearly parallel: the solution of least norm
    return np.linalg.lstsq(among, with_wanted, rcond=1e-12)[0]


def save(folder: Path, step: int, stds: Sequence[float], averages: Sequence[dict[str, Tensor]]) -> None:
    """Writes the averages at a step to <folder>/step_<k>.safetensors, atomically.

    If an average is not finite, nothing is written and an error is logged.

    Raises:
        OSError: the file cannot be written.
    """
    path = folder / f"step_{step:08d}.safetensors"
    tensors = {
        f"{i}/{name}": weight.contiguous()
        for i, average in enumerate(averages)
        for name, weight in average.items()
    }
    broken = [name for name, weight in tensors.items() if not bool(weight.isfinite().all())]
    if broken:
        log.error("%s is not written: %s is not finite", path, broken[0])
        return
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tmp"):  # from a killed process
        leftover.unlink()
    metadata = {"step": str(step), "stds": json.dumps(list(stds)), "sha256": _hash(tensors)}
    write_atomically(path, serialised(tensors, metadata))


def snapshots(folder: Path) -> list[Path]:
    """The files written by `save`, oldest first."""
    found = [
        path for path in folder.glob("step_*.safetensors") if path.stem.removeprefix("step_").isdecimal()
    ]
    return sorted(found, key=step_of)


def step_of(snapshot: Path) -> int:
    """The optimiser step of a snapshot."""
    return int(snapshot.stem.removeprefix("step_"))


def synthesise(folder: Path, std: float, step: int) -> dict[str, Tensor]:
    """The average of length `std` at a step, from the snapshots up to that step.

    Args:
        folder: the folder of the snapshots.
        std: relative standard deviation of the profile.
        step: optimiser step at which the average ends.

    Returns:
        Weights by parameter name, in the snapshots' dtype.

    Raises:
        UserError: there is no snapshot of that step, or std is out of range.
    """
    paths = [path for path in snapshots(folder) if step_of(path) <= step]
    if not paths or step_of(paths[-1]) != step:
        raise UserError(
            f"weights={std:g}: {folder} has no snapshot of step {step}; train with ema=power, which writes snapshots"
            " every ema.snapshot_every steps and at the end"
        )
    try:
        gamma = exponent(std)
    except ValueError:
        raise UserError(f"weights={std:g} must be ema, raw or a length in (0, {LARGEST_STD:.3f}]") from None
    stored = [(step_of(path), exponent(each)) for path in paths for each in _read(path)[0]]
    combination = iter(coefficients(stored, (step, gamma)))
    total: dict[str, Tensor] = {}
    for path in paths:
        stds, tensors = _read(path)
        factors = [next(combination) for _ in stds]
        for key, tensor in tensors.items():
            i, name = key.split("/", 1)
            share = tensor.double() * factors[int(i)]
            total[name] = total[name] + share if name in total else share
        dtype = tensor.dtype
    return {name: weight.to(dtype) for name, weight in total.items()}


def _hash(tensors: dict[str, Tensor]) -> str:
    return sha256(serialised(tensors)).hexdigest()


def _read(path: Path) -> tuple[list[float], dict[str, Tensor]]:
    """The lengths and the tensors of a snapshot.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        stds = TypeAdapter(list[float]).validate_json(metadata["stds"])
        for std in stds:
            exponent(std)
        # snapshots of earlier releases have no hash
        intact = metadata.get("sha256") in (None, _hash(tensors))
        complete = {int(name.split("/", 1)[0]) for name in tensors} == set(range(len(stds)))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0][:100]}): remove it") from None
    if not (intact and complete):
        raise UserError(f"{path} is damaged: remove it")
    return stds, tensors


def _inner_product(step_a, gamma_a, step_b, gamma_b) -> np.ndarray:
    """The integral of p_a p_b for two profiles; the arguments broadcast."""
    step_a, gamma_a, step_b, gamma_b = np.broadcast_arrays(step_a, gamma_a, step_b, gamma_b)
    # the integral of t^(gamma_a + gamma_b) up to the earlier step, in a form that does not overflow
    earlier, later = np.minimum(step_a, step_b), np.maximum(step_a, step_b)
    gamma_of_later = np.where(step_a < step_b, gamma_b, gamma_a)
    shape = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return shape * (earlier / later) ** gamma_of_later / later

"""Reading checkpoints, which may be untrusted or damaged: what they must hold, and whether it fits a training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired

import torch
from lightning.pytorch import Trainer
from packaging.version import Version
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from torch import Tensor, nn
from typing_extensions import TypedDict

from src.data.datamodule import ImageDataModule
from src.errors import UserError
from src.runs.files import Count
from src.runs.tensors import load_tensors
from src.training.ema import EMA

LARGEST = 1 << 62
"""Bound of all numbers in restored states; finite, too."""
Weights = dict[str, Tensor]
Anything = ConfigDict(arbitrary_types_allowed=True)


@with_config(Anything)
class Samples(TypedDict):
    """The state of the data stream."""

    samples: Count


class Origin(TypedDict):
    """What `src.training.resume.Origin` stores."""

    data: str | None
    code: dict[str, Any]
    world_size: Count
    accumulation: Count
    machine: dict[str, str]


@with_config(Anything)
class Average(TypedDict):
    """The state of an `EMA`."""

    weights: Weights
    others: list[Weights]
    updates: Count


Content = with_config(Anything)(
    TypedDict(
        "Content",
        {
            "config": dict[str, Any],
            "state_dict": dict[str, Tensor | Weights],  # a module's extra state may be a dictionary
            "callbacks": dict[str, Any],
            "global_step": Count,
            "epoch": NotRequired[Count],
            "loops": NotRequired[dict[str, dict[str, Any]]],
            "optimizer_states": NotRequired[list[dict[str, Any]]],
            "lr_schedulers": NotRequired[list[dict[str, Any]]],
            "origin": NotRequired[Origin],
            "imported": NotRequired[
                dict[str, str]
            ],  # where the weights come from, in a run of src.import_weights
            ImageDataModule.__qualname__: NotRequired[Samples],
        },
    )
)


def read_checkpoint(path: Path, mapped: bool = True) -> dict[str, Any]:
    """The content of a checkpoint, tensors and primitives only; code in the file is not executed.

    Args:
        path: the file.
        mapped: whether tensors are mapped from the file, not copied. The file must then stay where it is.

    Raises:
        UserError: the file is not a checkpoint of this project.
    """
    try:
        content = load_tensors(path, mapped)
        if isinstance(content, dict) and (missing := Content.__required_keys__ - set(content)):
            raise ValueError(f"missing {', '.join(sorted(missing))}")
        TypeAdapter(Content).validate_python(content, strict=True)
        for name, state in content["callbacks"].items():
            if name.startswith(EMA.__name__):
                TypeAdapter(Average).validate_python(state, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        wrong = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg'].lower()}"
    except Exception as error:
        wrong = (str(error).splitlines() or [type(error).__name__])[0][:120]
    else:
        return content
    raise UserError(f"{path} is not a checkpoint of this project ({wrong})")


def check_fits(content: Mapping[str, Any], trainer: Trainer, module: Any) -> None:
    """Checks the states that a checkpoint restores against those of a new training, before anything is restored.

    Lightning and torch copy a stored state as it is; a wrong one fails much later, or never. Optimiser and schedule
    are restored here for a trial, which also handles states of earlier releases of torch.

    Args:
        content: of `read_checkpoint`.
        trainer: of the training that continues.
        module: its LightningModule.

    Raises:
        UserError: a state has other entries, types or shapes.
    """
    try:
        Version(content["pytorch-lightning_version"])  # Lightning compares it
        _restore_for_trial(content, module)
        weights = dict(module.denoiser.network.named_parameters())
        for callback in trainer.callbacks:
            stored = content["callbacks"].get(callback.state_key, {})
            _compare(stored, callback.state_dict(), f"callbacks.{callback.state_key}")
            if isinstance(callback, EMA) and stored:
                for average in (stored["weights"], *stored["others"]):
                    _compare_shapes(average, weights, f"callbacks.{callback.state_key}.weights")
        _compare(content["loops"]["fit_loop"], trainer.fit_loop.state_dict(), "loops")
    except Exception as error:  # a wrong state can raise anything
        wrong = str(error).partition("\n")[0] or "an entry"
        wrong = f"{wrong} is missing" if isinstance(error, LookupError) else wrong
        raise UserError(
            f"the checkpoint does not fit this training ({wrong[:200]}): choose another checkpoint"
        ) from None


def _restore_for_trial(content: Mapping[str, Any], module: Any) -> None:
    configured = module.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    fresh = optimizer.state_dict()
    (stored,) = content["optimizer_states"]
    optimizer.load_state_dict({**stored, "state": {}})
    _compare(optimizer.state_dict(), fresh, "optimizer_states")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {dim: _moments(module, dim) for dim in {p.dim() for p in parameters}}
    for number, state in stored["state"].items():
        parameter = parameters[number]
        alike = {n: parameter if m.dim() else m for n, m in moments[parameter.dim()].items()}
        _compare_shapes(state, alike, f"optimizer_states.{number}")
    stored_schedules = content["lr_schedulers"][:1]  # none, if the schedule is new
    for stored in stored_schedules if isinstance(configured, dict) else ():
        schedule = configured["lr_scheduler"]["scheduler"]
        fresh = schedule.state_dict()
        if foreign := [name for name in stored if name not in fresh and hasattr(schedule, name)]:
            raise ValueError(f"lr_schedulers: unknown entry {foreign[0]}")
        _compare(stored, fresh, "lr_schedulers")


def _moments(module: Any, dim: int) -> dict[str, Any]:
    """The optimiser's state of a parameter with so many dimensions; tensors without dimensions count steps."""
    probe = nn.Parameter(torch.zeros([1] * max(dim, 1)))
    tried = module.make_optimizer([probe])
    probe.grad = torch.zeros_like(probe)
    tried.step()
    return tried.state_dict()["state"].get(0, {})


def _compare(stored: Any, fresh: Any, name: str) -> None:
    """Compares the types of common entries.

    Raises:
        ValueError: they differ.
    """
    if isinstance(fresh, dict) and isinstance(stored, dict):
        for key in fresh.keys() & stored.keys():
            _compare(stored[key], fresh[key], f"{name}.{key}")
    elif isinstance(fresh, list | tuple) and isinstance(stored, list | tuple):
        if fresh and len(stored) != len(fresh):
            raise ValueError(f"{name} has {len(stored)} parts, not {len(fresh)}")
        for number, pair in enumerate(zip(stored, fresh, strict=False)):
            _compare(*pair, f"{name}.{number}")
    elif stored is not None and not isinstance(
        stored, int | float | Tensor if _is_number(fresh) else type(fresh)
    ):
        raise ValueError(f"{name} is of type {type(stored).__name__}")
    elif isinstance(stored, int | float) and not -LARGEST < stored < LARGEST and _is_number(fresh):
        raise ValueError(f"{name}={stored}")


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float | Tensor)


def _compare_shapes(stored: Weights, alike: Mapping[str, Tensor], name: str) -> None:
    """Raises ValueError for tensors of other names or shapes."""
    for key in stored.keys() | alike.keys():
        found, wanted = (getattr(tensors.get(key), "shape", None) for tensors in (stored, alike))
        if found is None or found != wanted:
            raise ValueError(f"{name}.{key}: shape {found and tuple(found)}, not {wanted and tuple(wanted)}")

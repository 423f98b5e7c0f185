"""Tensors that are divided among processes (`trainer=fsdp`); other tensors pass unchanged."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(content: Any) -> Any:
    """Nested dictionaries and lists with whole tensors in place of divided ones; called by all processes."""
    if isinstance(content, DTensor):
        return content.detach().full_tensor().cpu()
    if isinstance(content, dict):
        return type(content)((name, whole(value)) for name, value in content.items())
    if isinstance(content, list | tuple):
        return type(content)(whole(value) for value in content)
    return content


def divided(tensor: Any, alike: Tensor) -> Any:
    """This process's part of a whole tensor, if it has the shape of a divided one; else the tensor itself."""
    if not isinstance(alike, DTensor) or isinstance(tensor, DTensor):
        return tensor
    if not isinstance(tensor, Tensor) or tensor.shape != alike.shape:
        return tensor
    there = tensor.to(alike.device)
    return distribute_tensor(there, alike.device_mesh, alike.placements, src_data_rank=None)


def parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's parts of tensors, which share their memory; the tensors themselves if they are not divided."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def norm_of(norm: Tensor) -> Tensor:
    """A norm over the divided gradients of all processes."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm

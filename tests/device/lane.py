"""A device without hardware: tensors on it have shapes, dtypes and a device, but no values.

Work on CPU tensors is done as usual. Work on the device is done by torch's FakeTensorMode, so that mixing in a CPU
tensor raises, and reading a value raises DataDependentOutputException. `backward` is not possible there without a
driver; for it the same lane runs on the meta device.
"""

import traceback
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SRC = Path(__file__).parents[2] / "src"


class Float64Error(RuntimeError):
    """A float64 tensor was made on a device that may have none."""


class Lane(TorchDispatchMode):
    """Within it, `device` can be used without hardware.

    Args:
        device: "cuda", or "meta" for backward.
        float64: whether the device has float64; MPS has not.
        answers: whether reading a value gives True or 0 instead of raising.

    Attributes:
        waits: where the host has waited for the device: values read, and copies without non_blocking. Each entry is
            "<file under src>:<line>: <operation>".
        copies: all copies between the CPU and the device, in the same form.
    """

    def __init__(self, device: str = "cuda", float64: bool = True, answers: bool = False):
        super().__init__()
        self.device = torch.device(device)
        self.float64, self.answers = float64, answers
        self.waits: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        target = kwargs.get("device")
        ours = [tensor for tensor in tensors if self._holds(tensor)]
        if not ours and (target is None or torch.device(target).type != self.device.type):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if function is torch.ops.aten._local_scalar_dense.default:
            if ours[0].device.type == self.device.type:
                self._note(function)
            if self.answers:
                return True if ours[0].dtype == torch.bool else 0.0
        elif self._copies(function, args, kwargs, tensors):
            self.copies.append(f"{_place()}: {function}")
            if not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                self._note(function)
        if kwargs.get("generator") is not None:
            kwargs["generator"] = None
        result = function(*args, **kwargs)
        if not self.float64:
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64 and not _on_cpu(tensor):
                    raise Float64Error(f"{_place()}: {function} makes float64 on {tensor.device.type}")
        return result

    def _holds(self, tensor):
        # what was copied from the device to the CPU has no values either
        return isinstance(tensor, FakeTensor) or tensor.device.type == self.device.type

    def _copies(self, function, args, kwargs, tensors):
        """Whether this is a copy between CPU and device; the host waits for it without non_blocking."""
        if function is torch.ops.aten._to_copy.default:
            target = kwargs.get("device") or tensors[0].device
            return _on_cpu(tensors[0]) != (torch.device(target).type == "cpu")
        if function is torch.ops.aten.copy_.default:
            return _on_cpu(tensors[0]) != _on_cpu(tensors[1])
        return False

    def _note(self, function):
        self.waits.append(f"{_place()}: {function}")


def _on_cpu(tensor):
    return tensor.device.type == "cpu"


def _place():
    """The innermost line of src/ that is being run."""
    for frame in reversed(traceback.extract_stack()):
        if Path(frame.filename).is_relative_to(SRC):
            return f"{Path(frame.filename).relative_to(SRC)}:{frame.lineno}"
    return "outside src"


class _Generator(torch.Generator):
    """A generator that can be made for a device without hardware; there it draws nothing."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


@contextmanager
def lane(device="cuda", **options):
    """A `Lane` in which generators of the device can be made too."""
    active, own = Lane(device, **options), torch.Generator
    fake = nullcontext() if device == "meta" else FakeTensorMode(allow_non_fake_inputs=True)
    torch.Generator = _Generator
    try:
        with fake, active:
            yield active
    finally:
        torch.Generator = own

"""What a network promises, and how networks of other packages are made to keep it."""

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from src.conditioning import Condition


class Network(nn.Module, ABC):
    """A noise-conditional network: network(x, label, condition) -> output. It knows nothing of noise schedules.

    Attributes:
        image_shape: (C, H, W) of its input, not necessarily square; None where it takes any.
        out_channels: channels of its output: C, or 2 C where it also predicts the reverse step's variance.
        reads: the kinds of condition that it reads, of "labels", "tokens" and "image".
        second_time: whether it can be given the label of a second time s, for a step from t to s.
    """

    image_shape: tuple[int, int, int] | None = None
    out_channels: int
    reads: frozenset[str] = frozenset()
    second_time = False

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        label: Tensor,
        condition: "Condition | None" = None,
        to_label: Tensor | None = None,
    ) -> Tensor:
        """The network's output for noisy images.

        Args:
            x: noisy images, scaled by the parameterisation's c_in, shape (B, C, H, W).
            label: the time's label, float, shape (B,); not always a whole number.
            condition: what the images are conditioned on, or None for nothing; only kinds in `reads`.
            to_label: label of the second time s, shape (B,); only where `second_time` is True.

        Returns:
            Shape (B, out_channels, H, W).
        """


class ForeignNetwork(Network):
    """A network of another package behind our interface.

    It is called as module(x, label), and with labels of the condition as a third argument by the first name that
    its forward has: `condition`, `class_labels`, `y` or `labels`. Of what it returns, a tensor is taken as it is; of
    an object the attribute `sample` (diffusers), of a tuple the first entry.

    Args:
        module: the network.
        image_shape: (C, H, W) of its input.
        out_channels: channels of its output; by default its attribute of that name, or else C.
    """

    LABEL_ARGUMENTS = ("condition", "class_labels", "y", "labels")

    def __init__(self, module: nn.Module, image_shape: tuple[int, int, int], out_channels: int | None = None):
        super().__init__()
        self.module = module
        self.image_shape = tuple(image_shape)
        declared = vars(module).get("out_channels")
        if out_channels is None:
            out_channels = declared if isinstance(declared, int) else image_shape[0]
        self.out_channels = out_channels
        names = inspect.signature(module.forward).parameters
        self.label_argument = next((name for name in self.LABEL_ARGUMENTS if name in names), None)
        self.reads = frozenset({"labels"} if self.label_argument else ())

    def forward(self, x, label, condition=None, to_label=None):
        given: dict[str, Any] = {}
        if condition is not None and condition.labels is not None:
            given[self.label_argument] = condition.labels
        output = self.module(x, label, **given)
        if isinstance(output, Tensor):
            return output
        return output[0] if isinstance(output, tuple) else output.sample


def adapted(module: nn.Module, image_shape: tuple[int, int, int]) -> Network:
    """A `Network` as it is; any other module as a `ForeignNetwork`."""
    return module if isinstance(module, Network) else ForeignNetwork(module, image_shape)


def height_and_width(image_size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of an option that is one number for squares, or a pair.

    Raises:
        ValueError: it is neither.
    """
    sizes = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"image_size must be a positive number or [height, width], got {image_size}")
    return sizes

"""The interface of networks, and an adapter for networks of other packages."""

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from src.conditioning import Condition


class Network(nn.Module, ABC):
    """A noise-conditional network: network(x, label, condition) -> output. It is independent of the noise schedule.

    Attributes:
        image_shape: (C, H, W) of the input, not necessarily square; None if it accepts any shape.
        out_channels: channels of the output: C, or 2 C if it also predicts the reverse step's variance.
        reads: the kinds of condition it uses, out of "labels", "tokens", "image" and "augment".
        classifies: whether the output is logits of shape (B, classes), for `loss=classification`.
        autoencodes: whether it is an autoencoder, for `loss=reconstruction`.
        checkpointing: whether `run` recomputes activations in the backward pass.
        second_time: whether it is given the label of a second time.
    """

    image_shape: tuple[int, int, int] | None = None
    out_channels: int
    reads: frozenset[str] = frozenset()
    classifies = False
    autoencodes = False
    checkpointing: bool = False
    second_time: bool = False

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
            label: the label of the time, float, shape (B,); not necessarily an integer.
            condition: the condition of the images, only with kinds in `reads`; or None.
            to_label: label of the second time s, shape (B,); only for networks that are built for steps from t to s.

        Returns:
            Shape (B, out_channels, H, W).
        """

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        """block(*inputs); with `checkpointing`, only the inputs are kept for the backward pass.

        The activations inside the block are computed again there, with the same dropout (Chen et al. 2016,
        arXiv:1604.06174).
        """
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def after_optimizer_step(self) -> None:
        """Called after each optimiser step, for networks that constrain their weights; does nothing by default."""


class ForeignNetwork(Network):
    """Adapts a network of another package to `Network`.

    It is called as module(x, label). Class labels are passed by the first of these names that its `forward` has:
    `condition`, `class_labels`, `y`, `labels`. The output is the returned tensor, the first entry of a returned tuple,
    or the attribute `sample` of a returned object (diffusers).

    Args:
        module: the network.
        image_shape: (C, H, W) of the input.
        out_channels: channels of the output; by default the module's attribute of that name, otherwise C.
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
    """Returns a `Network` unchanged and wraps any other module in a `ForeignNetwork`."""
    return module if isinstance(module, Network) else ForeignNetwork(module, image_shape)


def height_and_width(image_size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of an image size given as one number (square images) or a pair.

    Raises:
        ValueError: image_size is neither.
    """
    sizes = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"image_size must be a positive number or [height, width], got {image_size}")
    return sizes

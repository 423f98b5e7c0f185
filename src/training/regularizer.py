"""Regularisers: terms of the training loss that read hidden activations of the network."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from src.conditioning import Condition
from src.model import Network


class Regularizer(nn.Module, ABC):
    """A term of the training loss that reads the output of one layer. Its own parameters are trained too.

    The layer is observed by a forward hook while the loss of a batch is computed, so the network does not change. The
    loss must evaluate the network once for a batch. Validation does not have the term.

    Args:
        network: the network that is trained; it does not become a part of this module.
        image_shape: (C, H, W) of the network's input.
        weight: factor of the term, positive.
        layer: name of the layer, as in `network.named_modules()`, e.g. "blocks.2" or "middle.1"; None for the block
            after `depth_of` of all blocks of a transformer, and for the last block of the middle of a U-Net.

    Attributes:
        hidden_shape: shape of the layer's output for one image.
        needs_pairs: whether the term compares the images of a batch with each other.

    Raises:
        ValueError: weight is not positive, or the network has no such layer.
    """

    needs_pairs = False

    def __init__(self, network: Network, image_shape: Sequence[int], weight: float, layer: str | None = None):
        super().__init__()
        if weight <= 0:
            raise ValueError(
                f"weight must be positive, got {weight:g}: leave the term out by regularizer=none"
            )
        self.weight = weight
        default = default_layer(network, self.depth_of)
        if layer is None and default is None:
            raise ValueError(
                "layer=null: this network has neither blocks nor a middle; name one of its modules"
            )
        self.layer = default if layer is None else layer
        other = "" if default is None else f", e.g. {default}"
        if self.layer not in dict(network.named_modules()):
            raise ValueError(f"layer={self.layer!r}: the network has no such module; choose another{other}")
        outputs = self._probe(network, image_shape)
        if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
            raise ValueError(
                f"layer={self.layer!r}: an evaluation of the network does not call it once, for one tensor; choose"
                f" another{other}"
            )
        self.hidden_shape = outputs[0].shape[1:]

    @staticmethod
    @abstractmethod
    def depth_of(blocks: int) -> int:
        """The number of blocks up to the default layer, of so many blocks of a transformer."""

    @abstractmethod
    def term(self, hidden: Tensor, x0: Tensor) -> Tensor:
        """The term, without its weight; shape ().

        Args:
            hidden: the layer's output, shape (B, *hidden_shape), at least float32.
            x0: the encoded images, shape (B, C, H, W).
        """

    def describe(self) -> str:
        """What reads which layer, in a line."""
        shape = " x ".join(map(str, self.hidden_shape))
        return f"{type(self).__name__} of {self.layer}, {shape} activations"

    @contextmanager
    def observing(self, network: nn.Module) -> Iterator[list[Any]]:
        """Within it, the layer's outputs are appended to the list."""
        seen: list[Any] = []
        hook = network.get_submodule(self.layer).register_forward_hook(lambda *call: seen.append(call[-1]))
        try:
            yield seen
        finally:
            hook.remove()

    def forward(self, seen: Sequence[Tensor], x0: Tensor) -> Tensor:
        """The weighted term, shape (); see `term`.

        Args:
            seen: what `observing` has given, one output.
            x0: the encoded images, shape (B, C, H, W).
        """
        (hidden,) = seen
        return self.weight * self.term(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), x0)

    def _probe(self, network: Network, image_shape: Sequence[int]) -> list[Any]:
        """What the layer gives for one image of zeros."""
        condition = Condition(labels=torch.zeros(1, dtype=torch.long)) if "labels" in network.reads else None
        training = network.training
        try:
            with torch.no_grad(), self.observing(network) as seen:
                network.eval()(torch.zeros(1, *image_shape), torch.zeros(1), condition)
        finally:
            network.train(training)
        return seen


def default_layer(network: nn.Module, depth_of: Callable[[int], int]) -> str | None:
    """The layer that is read by default; None for a network that has neither `blocks` nor a `middle`."""
    blocks, middle = getattr(network, "blocks", None), getattr(network, "middle", None)
    if isinstance(blocks, nn.ModuleList) and len(blocks):
        return f"blocks.{max(depth_of(len(blocks)), 1) - 1}"
    if isinstance(middle, nn.ModuleList) and len(middle):
        return f"middle.{len(middle) - 1}"
    return None


class Dispersive(Regularizer):
    """Dispersive loss (Wang & He 2025, arXiv:2506.09027), with squared l2 distances: hidden activations repel.

        weight log mean_{i,j} exp(-||z_i - z_j||^2 / (d temperature)),    z_i the d activations of image i

    The mean is over all pairs of a batch, those of i = j too, so the term is at most 0. The distance is divided by the
    number of activations, as in the authors' code. The paper's layer is that after a quarter of the blocks. The batch
    is that of one device and micro-batch, as there (16 images), so the result depends on how a batch is split.

    Args:
        network, image_shape, layer: see `Regularizer`.
        weight: 0.5 in the paper.
        temperature: positive; 0.5 in the paper.

    Raises:
        ValueError: an argument is out of range, or the network has no such layer.
    """

    needs_pairs = True

    def __init__(
        self,
        network: Network,
        image_shape: Sequence[int],
        weight: float = 0.5,
        temperature: float = 0.5,
        layer: str | None = None,
    ):
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature:g}")
        super().__init__(network, image_shape, weight, layer)
        self.temperature = temperature

    @staticmethod
    def depth_of(blocks):
        return blocks // 4

    def term(self, hidden, x0):
        z = hidden.flatten(1)
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            z = z - z.mean(dim=0)  # which keeps distances, and digits
            products = z @ z.T  # pdist's backward pass takes n^2 d values on a GPU
            squares = products.diagonal()
            distances = (squares[:, None] + squares - 2 * products).clamp(min=0) / z.shape[1]
            distances = distances - distances.diagonal().diag_embed()
        return (-distances / self.temperature).flatten().logsumexp(dim=0) - 2 * math.log(len(z))

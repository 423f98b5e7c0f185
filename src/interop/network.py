"""A network in the layout of other code, and what its shapes say."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from src.interop.links import Link, read_all

Weights = Mapping[str, Tensor]

DDPM_PROCESS = {"schedule": "linear", "parameterization": "eps"}


@dataclass(frozen=True)
class Network:
    """A network in another layout.

    Attributes:
        model: class and options of our network, as in conf/model.
        links: its weights.
        channels: channels of the images.
        outputs: outputs per channel, 2 with a learned variance.
        num_classes: number of classes; 0 for an unconditional network.
        process: choices of conf/train.yaml that give input and output their meaning.
        ignored: names of their weights that sampling does not use.
        side: side length of the images that it was built for, if the weights show it.
    """

    model: dict[str, Any]
    links: list[Link]
    channels: int
    outputs: int = 1
    num_classes: int = 0
    process: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    side: int | None = None

    def read(self, theirs: Weights) -> dict[str, Tensor]:
        """Our state dict; see `read_all`."""
        return read_all(self.links, theirs, self.ignored)

    def for_data(self, num_classes: int) -> "Network":
        """The network of data with so many classes, where its weights can be read in two ways."""
        return self


def numbers(weights: Weights, pattern: str) -> list[int]:
    """The different numbers in names that match a pattern with one group, ascending."""
    return sorted({int(match[1]) for name in weights if (match := re.match(pattern, name))})


def multipliers(widths: list[int], base: int) -> list[int]:
    """The channels of levels in units of those of the first layer.

    Raises:
        ValueError: they are no multiples.
    """
    if any(width % base for width in widths):
        raise ValueError(
            f"levels of {widths} channels are no multiples of the {base} channels of the first layer"
        )
    return [width // base for width in widths]

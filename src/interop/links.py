"""The correspondence of two networks' weights as a list of links, which is read in both directions.

A link joins one weight of ours to one of theirs, or to several that ours stacks. What differs besides the name is part
of the link: 1x1 convolutions for linear layers, the order of the rows of query, key and value, the order of sines and
cosines, and the row of the class embedding for "no class".
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PART_HEAD_CHANNEL = ""
HEAD_PART_CHANNEL = "head part channel"
HEAD_CHANNEL_PART = "head channel part"


@dataclass(frozen=True)
class Link:
    """One weight of ours and its counterpart.

    Attributes:
        ours: its name.
        theirs: the names of its counterparts, stacked along the first dimension.
        kernel: dimensions of size 1 that theirs have at the end: 2 for a 1x1 convolution in two dimensions.
        rows: the order of the rows of query, key and value; ours is (part, head, channel).
        heads: heads of that attention.
        swapped: whether their sinusoidal embedding has cosines first, where ours has sines.
        no_class: whether ours has a last row more, for "no class"; it is zero where theirs is read.
        transposed: whether theirs is a linear layer of one-hot vectors, where ours is an embedding.
    """

    ours: str
    theirs: tuple[str, ...]
    kernel: int = 0
    rows: str = PART_HEAD_CHANNEL
    heads: int = 1
    swapped: bool = False
    no_class: bool = False
    transposed: bool = False

    def read(self, theirs: Mapping[str, Tensor]) -> Tensor:
        """Our weight from theirs."""
        weight = torch.cat([theirs[name] for name in self.theirs])
        if self.kernel and weight.dim() > 2:
            weight = weight.flatten(1)
        if self.rows == HEAD_PART_CHANNEL:
            weight = weight.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        elif self.rows == HEAD_CHANNEL_PART:
            weight = weight.unflatten(0, (self.heads, -1, 3)).movedim(2, 0).flatten(0, 2)
        if self.swapped:
            weight = torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)
        if self.transposed:
            weight = weight.T
        if self.no_class:
            weight = torch.cat((weight, torch.zeros_like(weight[:1])))
        return weight.contiguous()

    def write(self, weight: Tensor) -> dict[str, Tensor]:
        """Their weights from ours."""
        if self.no_class:
            weight = weight[:-1]
        if self.transposed:
            weight = weight.T
        if self.swapped:
            weight = torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)
        if self.rows == HEAD_PART_CHANNEL:
            weight = weight.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)
        elif self.rows == HEAD_CHANNEL_PART:
            weight = weight.unflatten(0, (3, self.heads, -1)).movedim(0, 2).flatten(0, 2)
        if self.kernel and weight.dim() > 1:
            weight = weight.reshape(*weight.shape, *[1] * self.kernel)
        # safetensors does not save tensors that share memory
        return {
            name: part.clone(memory_format=torch.contiguous_format)
            for name, part in zip(self.theirs, weight.chunk(len(self.theirs)), strict=True)
        }


def layers(pairs: Mapping[str, str], ours: str = "", theirs: str = "", **kind: int) -> list[Link]:
    """Links of the weights and biases of layers.

    Args:
        pairs: their names by ours.
        ours, theirs: prefixes of all names.
        kind: attributes of the links.
    """
    return [
        Link(f"{ours}{a}.{end}", (f"{theirs}{b}.{end}",), **kind)
        for a, b in pairs.items()
        for end in ("weight", "bias")
    ]


def among(links: Iterable[Link], names: Iterable[str]) -> list[Link]:
    """The links whose counterparts exist: a block may lack its shortcut, a layer its bias."""
    known = set(names)
    return [link for link in links if known.issuperset(link.theirs)]


def read_all(
    links: Sequence[Link], theirs: Mapping[str, Tensor], ignored: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Our state dict from theirs.

    Raises:
        ValueError: a weight of theirs that no link names.
    """
    used = among(links, theirs)
    unknown = theirs.keys() - {name for link in used for name in link.theirs} - set(ignored)
    if unknown:
        raise ValueError(
            f"{min(unknown)} is not a weight of this layout: other architectures cannot be converted"
        )
    return {link.ours: link.read(theirs) for link in used}


def write_all(links: Iterable[Link], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict from ours.

    Raises:
        ValueError: a weight of ours that no link names.
    """
    by_name = {link.ours: link for link in links}
    if unknown := ours.keys() - by_name.keys():
        raise ValueError(
            f"{min(unknown)} is not a weight of this layout: other architectures cannot be converted"
        )
    written: dict[str, Tensor] = {}
    for name, weight in ours.items():
        written |= by_name[name].write(weight)
    return written


def with_attributes(links: Iterable[Link], ending: str, **changes: object) -> list[Link]:
    """The links, with other attributes where our name has this ending."""
    return [replace(link, **changes) if link.ours.endswith(ending) else link for link in links]

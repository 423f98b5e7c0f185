"""The vector by which a network is conditioned on the time, the class and a second time."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from src.model.blocks import zero
from src.model.embedding import TimeEmbedding

if TYPE_CHECKING:
    from src.conditioning import Condition


def class_rows(condition: "Condition | None", num_classes: int, label: Tensor) -> Tensor | None:
    """Rows of a class embedding with num_classes + 1 rows, whose last row represents "no class".

    Args:
        condition: the condition of the images; class labels of -1 (`NO_CLASS`) or num_classes mean "no class".
        num_classes: number of classes; 0 for an unconditional network.
        label: the label of the time, which has the wanted shape (B,) and device.

    Returns:
        int64, shape (B,); None for an unconditional network.

    Raises:
        ValueError: labels are given, but the network has no classes.
    """
    labels = None if condition is None else condition.labels
    if not num_classes:
        if labels is not None:
            raise ValueError(
                "the network has no classes: give no condition, or build it with num_classes > 0"
            )
        return None
    if labels is None:
        return torch.full_like(label, num_classes, dtype=torch.long)
    return labels.where(labels >= 0, num_classes)


def second_label(label: Tensor, to_label: Tensor | None, supported: bool) -> Tensor:
    """The label of the second time; by default that of the first.

    Raises:
        ValueError: it is given, but the network does not support it.
    """
    if to_label is not None and not supported:
        raise ValueError("the network has no second time: build it with second_time=true")
    return label if to_label is None else to_label


def augmentation_layer(augment_channels: int, channels: int) -> nn.Linear | None:
    """A linear map of augmentations, initialised to zero; zeros give zero. None for 0 augment_channels."""
    if not augment_channels:
        return None
    layer = nn.Linear(augment_channels, channels, bias=False)
    nn.init.zeros_(layer.weight)
    return layer


def with_augmentation(embedding: Tensor, condition: "Condition | None", layer: nn.Linear | None) -> Tensor:
    """The embedding plus that of the condition's augmentation, if it has one.

    Raises:
        ValueError: there is one, but the network has no layer for it.
    """
    if condition is None or condition.augment is None:
        return embedding
    if layer is None:
        raise ValueError("the network reads no augmentation: build it with augment_channels > 0")
    return embedding + layer(condition.augment.to(embedding.dtype))


class ConditionEmbedding(nn.Module):
    """The sum of the embeddings of the time, the class, a second time and an augmentation.

    Args:
        dim: width of the sinusoidal embedding of a time, an even number, at least 4.
        channels: width of the result.
        num_classes: number of classes; 0 for an unconditional network.
        frequency_shift: of the sinusoidal embedding, see `sinusoidal_embedding`.
    """

    def __init__(self, dim: int, channels: int, num_classes: int, frequency_shift: int = 1):
        super().__init__()
        self.dim, self.channels, self.num_classes = dim, channels, num_classes
        self.time = TimeEmbedding(dim, channels, frequency_shift)
        self.classes = nn.Embedding(num_classes + 1, channels) if num_classes else None
        self.second_time: TimeEmbedding | None = None
        self.augmentation: nn.Linear | None = None

    def add_second_time(self) -> None:
        """Adds the embedding of a second time, initialised to zero.

        A network calls it last, so that the initial weights of its other layers do not depend on it.
        """
        self.second_time = TimeEmbedding(self.dim, self.channels, self.time.frequency_shift)
        zero(self.second_time.linear2)

    def add_augmentation(self, augment_channels: int) -> None:
        """Adds the embedding of an augmentation, initialised to zero; called last, as `add_second_time`."""
        self.augmentation = augmentation_layer(augment_channels, self.channels)

    def forward(self, label: Tensor, condition: "Condition | None", to_label: Tensor | None) -> Tensor:
        """The embedding, shape (B, channels); see `Network.forward` for the arguments.

        Raises:
            ValueError: a class, a second time or an augmentation is given, but the network does not support it.
        """
        embedding = self.time(label)
        rows = class_rows(condition, self.num_classes, label)
        if self.classes is not None:
            embedding = embedding + self.classes(rows)
        embedding = with_augmentation(embedding, condition, self.augmentation)
        to_label = second_label(label, to_label, self.second_time is not None)
        return embedding if self.second_time is None else embedding + self.second_time(to_label)

"""How a network is conditioned in training and in sampling."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from src.randomness import draws_at, generator

from .condition import Condition


class Conditioning(ABC):
    """Defines which part of the data's condition a network gets, and the conditions of sampled images.

    Args:
        dropout: probability that the condition of a training image is dropped, in [0, 1). Required for
            classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, alg. 1; 0.1 to 0.2 there).

    Attributes:
        kinds: the kinds of condition the network must read, out of "labels", "tokens" and "image".

    Raises:
        ValueError: dropout is out of range.
    """

    kinds: frozenset[str] = frozenset()

    def __init__(self, dropout: float = 0.0):
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.dropout = dropout

    @abstractmethod
    def of_samples(self, indices: Sequence[int]) -> Condition:
        """The condition of the images with these indices in a sampling run, on the CPU."""

    @abstractmethod
    def describe_samples(self) -> str:
        """A description of the condition of image i of a sampling run, for records."""

    def check(self, shape: tuple[int, int, int]) -> None:  # noqa: B027 - most accept every shape
        """Checks the conditioning against (C, H, W) of the network's images.

        Raises:
            ValueError: it does not suit them.
        """

    def of_data(self, condition: Condition, x0: Tensor) -> Condition:
        """The condition that is passed to the network for images of the data.

        Args:
            condition: the condition of the data.
            x0: the encoded images, shape (B, C, H, W).
        """
        return condition.only(self.kinds)

    def of_training(
        self, condition: Condition, x0: Tensor, positions: Tensor, seed: int, batch_size: int
    ) -> Condition:
        """The condition of training images, after dropout.

        Dropout is drawn for the whole global batch, keyed by (seed, "condition dropout", batch number).

        Args:
            condition: the condition of the data.
            x0: the encoded images, shape (b, C, H, W).
            positions: positions in the training stream, int64, shape (b,), on the CPU.
            seed: the run's seed.
            batch_size: the global batch size.
        """
        condition = self.of_data(condition, x0)
        if not self.dropout:
            return condition

        def drawn(number: int) -> Tensor:
            return torch.rand(batch_size, generator=generator(seed, "condition dropout", number))

        return condition.drop(draws_at(positions, batch_size, drawn) < self.dropout)


class ByClass(Conditioning):
    """Class conditioning; image i of a sampling run has class i mod num_classes.

    Args:
        num_classes: number of classes, at least 1.
        dropout: see `Conditioning`.

    Raises:
        ValueError: an argument is out of range.
    """

    kinds = frozenset({"labels"})

    def __init__(self, num_classes: int, dropout: float = 0.0):
        super().__init__(dropout)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes

    def of_samples(self, indices):
        return Condition(labels=torch.tensor([i % self.num_classes for i in indices]))

    def describe_samples(self):
        return f"image i has label i mod {self.num_classes}"

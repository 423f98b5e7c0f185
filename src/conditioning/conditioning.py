"""The rule by which a network is conditioned, in training and in sampling."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from src.randomness import draws_at, generator

from .condition import Condition


class Conditioning(ABC):
    """What of the data's condition a network is given, and what the images of a sampling run are conditioned on.

    Args:
        dropout: probability that a training image loses its condition, in [0, 1): classifier-free guidance needs
            it (Ho & Salimans 2022, arXiv:2207.12598, alg. 1; 0.1 to 0.2 there).

    Attributes:
        kinds: the kinds of condition that the network must read, of "labels", "tokens" and "image".

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
        """The condition of the images with these numbers in a sampling run, on the CPU."""

    @abstractmethod
    def describe_samples(self) -> str:
        """Which condition image i of a sampling run has, in words for records."""

    def of_data(self, condition: Condition) -> Condition:
        """The part of the data's condition that the network is given."""
        return condition.only(self.kinds)

    def of_training(
        self, condition: Condition, positions: torch.Tensor, seed: int, batch_size: int
    ) -> Condition:
        """The condition of training images, some of them dropped.

        Which are is drawn for the whole global batch, keyed by (seed, "condition dropout", number of the batch).

        Args:
            condition: of the data.
            positions: places in the training stream, int64, shape (b,), on the CPU.
            seed: the run's seed.
            batch_size: the global batch size.
        """
        condition = self.of_data(condition)
        if not self.dropout:
            return condition

        def drawn(number: int) -> torch.Tensor:
            return torch.rand(batch_size, generator=generator(seed, "condition dropout", number))

        return condition.drop(draws_at(positions, batch_size, drawn) < self.dropout)


class ByClass(Conditioning):
    """The network is given class labels; image i of a sampling run has class i mod num_classes.

    Args:
        num_classes: number of classes, at least 1.
        dropout: see `Conditioning`.

    Raises:
        ValueError: a number is out of range.
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

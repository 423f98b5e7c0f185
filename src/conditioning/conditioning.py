"""How a network is conditioned in training and in sampling."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, Self

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
        period: number of images after which the conditions of a sampling run repeat; None if they do not.
        reads_validation: whether the conditions of a sampling run come from the data's validation split.

    Raises:
        ValueError: dropout is out of range.
    """

    kinds: frozenset[str] = frozenset()
    period: int | None = None
    reads_validation: bool = False

    def __init__(self, dropout: float = 0.0):
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.dropout = dropout

    @abstractmethod
    def of_samples(self, indices: Sequence[int], seed: int) -> Condition:
        """The condition of the images with these indices in a sampling run, on the CPU.

        That of image i depends only on (seed, i).
        """

    def texts(self, indices: Sequence[int]) -> list[str] | None:
        """The prompts of the images with these indices in a sampling run; None if they have none."""
        return None

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
    """Class conditioning.

    Args:
        num_classes: number of classes, at least 1.
        dropout: see `Conditioning`.

    Attributes:
        labels: the classes of sampled images. "balanced": image i has class i mod num_classes; "random": it has a
            class drawn uniformly by (seed, "labels", i); a list: the list is repeated. See `with_labels`.

    Raises:
        ValueError: an argument is out of range.
    """

    kinds = frozenset({"labels"})

    def __init__(self, num_classes: int, dropout: float = 0.0):
        super().__init__(dropout)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.labels: Literal["balanced", "random"] | list[int] = "balanced"

    def with_labels(self, labels: Literal["balanced", "random"] | Sequence[int]) -> Self:
        """A copy whose sampled images have other classes; see the attribute `labels`.

        Raises:
            ValueError: the list is empty, or a class does not exist.
        """
        if labels not in ("balanced", "random"):
            labels = list(labels)
            wrong = [label for label in labels if not 0 <= label < self.num_classes]
            if wrong or not labels:
                found = f"{wrong[0]}: there is no such class" if wrong else "[]: the list is empty"
                raise ValueError(
                    f"labels={found}; choose balanced, random, or classes, 0 to {self.num_classes - 1}"
                )
        other = copy.copy(self)
        other.labels = labels
        return other

    @property
    def period(self):
        if isinstance(self.labels, list):
            return len(self.labels)
        return self.num_classes if self.labels == "balanced" else None

    def of_samples(self, indices, seed):
        if self.labels == "random":

            def label(i: int) -> int:
                return int(torch.randint(self.num_classes, (), generator=generator(seed, "labels", i)))

        else:
            cycle = range(self.num_classes) if self.labels == "balanced" else self.labels

            def label(i: int) -> int:
                return cycle[i % len(cycle)]

        return Condition(labels=torch.tensor([label(i) for i in indices]))

    def describe_samples(self):
        if self.labels == "random":
            return f"image i has a label drawn from 0 to {self.num_classes - 1} by (seed, i)"
        if self.labels == "balanced":
            return f"image i has label i mod {self.num_classes}"
        return f"image i has entry i mod {len(self.labels)} of {self.labels}"

"""Conditioning on texts: the encoded captions of images, and the prompts of sampled ones."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .condition import Condition
from .conditioning import Conditioning


@dataclass(frozen=True)
class TextTable:
    """The encoded texts of n images, one after another and without padding.

    Attributes:
        states: the encoder's last hidden states, shape (total number of tokens, D); may be mapped from a file.
        first: row of each image's first token, int64, shape (n,).
        length: number of tokens of each image, 0 for an image without text, int64, shape (n,).
        max_length: L, at least the largest length.
    """

    states: Tensor
    first: Tensor
    length: Tensor
    max_length: int

    def __len__(self) -> int:
        """n."""
        return len(self.length)

    def condition(self, indices: Tensor | Sequence[int]) -> Condition:
        """The texts of the images with these indices, padded with zeros to (b, L, D), so that no value depends on the
        batch."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        place = torch.arange(self.max_length)
        mask = place < self.length[chosen, None]
        tokens = self.states.new_zeros(*mask.shape, self.states.shape[1])
        tokens[mask] = self.states[(self.first[chosen, None] + place)[mask]]
        return Condition(tokens=tokens, mask=mask)


class TextEncoder(ABC):
    """A frozen text encoder."""

    @property
    @abstractmethod
    def width(self) -> int:
        """D, the width of a token's embedding; found without loading the weights.

        Raises:
            UserError: the encoder is not available; names the option and the fix.
        """

    @abstractmethod
    def __call__(self, texts: Sequence[str]) -> TextTable:
        """Encodes texts; "" has no tokens."""

    @abstractmethod
    def describe(self) -> str:
        """Its name and a hash of its weights, for records."""


class ByText(Conditioning):
    """Text conditioning. Image i of a sampling run has prompt i mod number of prompts.

    Args:
        encoder: the text encoder; it is not trained and not stored in checkpoints.
        dropout: see `Conditioning`.
        prompts: the texts of sampled images; None for `captions`.
        captions: gives the captions of the validation split, in its order.

    Raises:
        ValueError: an argument is out of range.
    """

    kinds = frozenset({"tokens"})

    def __init__(
        self,
        encoder: TextEncoder,
        dropout: float = 0.1,
        prompts: Sequence[str] | None = None,
        captions: Callable[[], Sequence[str]] | None = None,
    ):
        super().__init__(dropout)
        if prompts is not None and not len(prompts):
            raise ValueError("prompts is empty: give at least one text")
        self.encoder = encoder
        self.prompts = prompts
        self.captions = captions
        self._table: TextTable | None = None

    @property
    def token_channels(self) -> int:
        """The width of a token's embedding."""
        return self.encoder.width

    @property
    def reads_validation(self):
        return self.prompts is None

    def texts(self, indices):
        prompts = self._prompts()
        return [prompts[i % len(prompts)] for i in indices]

    def of_samples(self, indices, seed):
        if self._table is None:
            self._table = self.encoder(self._prompts())
        return self._table.condition([i % len(self._table) for i in indices])

    def describe_samples(self):
        if self.prompts is None:
            which = "caption i mod n of the n images of the validation split"
        else:
            which = f"text i mod {len(self.prompts)} of {list(self.prompts)}"
        return f"image i has {which}, encoded by {self.encoder.describe()}"

    def _prompts(self) -> Sequence[str]:
        found = self.prompts if self.prompts is not None else self.captions() if self.captions else ()
        if not len(found):
            raise ValueError("prompts: the validation split has no captions; give prompts=[...]")
        return found

"""The condition of a batch of images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

# Label of an image whose class is dropped or unknown.
NO_CLASS = -1


@dataclass(eq=False)  # not frozen: Lightning's precision plugins rebuild it field by field
class Condition:
    """The condition of a batch of B images: any of class labels, token embeddings, images and
    augmentations.

    `Condition()` is empty: the images are unconditional.

    Attributes:
        labels: classes, int64, shape (B,); `NO_CLASS` (-1) for no class.
        tokens: text embeddings, shape (B, L, D).
        mask: valid tokens, bool, shape (B, L); an image without any True has no text.
        image: an additional input image of the network, shape (B, C, H, W).
        augment: what was done to training images, shape (B, K); None or zeros for nothing, as in sampling.
    """

    labels: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    image: Tensor | None = None
    augment: Tensor | None = None

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of condition present, out of "labels", "tokens", "image" and "augment"."""
        return frozenset(
            f.name for f in fields(self) if f.name != "mask" and getattr(self, f.name) is not None
        )

    def __len__(self) -> int:
        """B; 0 for an empty condition."""
        return next((len(part) for part in self._parts() if part is not None), 0)

    def index(self, indices: Tensor | Sequence[int] | slice) -> "Condition":
        """The conditions of the images with these indices, in this order."""
        chosen = indices if isinstance(indices, slice) else torch.as_tensor(indices)
        return self._map(lambda part: part[chosen])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Condition":
        """A copy on another device."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Condition":
        """A copy in page-locked memory, for DataLoader."""
        return self._map(Tensor.pin_memory)

    def only(self, kinds: frozenset[str]) -> "Condition":
        """A copy with only these kinds."""
        kept = {*kinds, "mask"} if "tokens" in kinds else kinds
        return Condition(**{f.name: getattr(self, f.name) for f in fields(self) if f.name in kept})

    def drop(self, which: Tensor) -> "Condition":
        """A copy with the condition of some images dropped: no class, no tokens, an image of zeros. Augmentations stay.

        Args:
            which: the images whose condition is dropped, bool, shape (B,).
        """
        labels, mask, image = self.labels, self.mask, self.image
        if labels is not None:
            labels = labels.masked_fill(which.to(labels.device, non_blocking=True), NO_CLASS)
        if self.tokens is not None:
            mask = torch.ones_like(self.tokens[..., 0], dtype=torch.bool) if mask is None else mask
            mask = mask & ~which.to(mask.device, non_blocking=True)[:, None]
        if image is not None:
            image = image.masked_fill(which.to(image.device, non_blocking=True)[:, None, None, None], 0)
        return Condition(labels, self.tokens, mask, image, self.augment)

    def dropped(self) -> "Condition":
        """A copy with the conditions of all images dropped."""
        return self.drop(torch.ones(len(self), dtype=torch.bool))

    @staticmethod
    def cat(conditions: Sequence["Condition"]) -> "Condition":
        """Concatenates the conditions of several batches, which must have the same kinds."""
        parts = zip(*(condition._parts() for condition in conditions), strict=True)
        return Condition(*(None if part[0] is None else torch.cat(part) for part in parts))

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.labels, self.tokens, self.mask, self.image, self.augment

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        return Condition(*(None if part is None else function(part) for part in self._parts()))

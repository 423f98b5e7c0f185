"""Images of a split for the conditions of a sampling run."""

from collections.abc import Sequence

from torch import Tensor

from src.data.codec import Codec
from src.data.source import ImageSource, Split


class Examples:
    """Maps indices to encoded images of a split, read at the first call; after the last image the first follows.

    Args:
        source: the data.
        codec: encodes the images.
        split: the split.
    """

    def __init__(self, source: ImageSource, codec: Codec, split: Split = "validation"):
        self.source, self.codec, self.split = source, codec, split

    def __call__(self, indices: Sequence[int]) -> Tensor:
        images = self.source.split(self.split)
        return self.codec.encode(images.images([index % len(images) for index in indices]))

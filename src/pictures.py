"""Images as pictures: grids and animations."""

import math

from PIL import Image
from torch import Tensor


def image_grid(images: Tensor, columns: int | None = None, smallest: int = 256) -> Image.Image:
    """A grid of images with thin gaps, as square as can be.

    Args:
        images: uint8, shape (B, C, H, W), C = 1 or 3.
        columns: images in a row; by default the square root of B.
        smallest: small pictures are enlarged by a whole factor to at least this width, each pixel a block.
    """
    from torchvision.utils import make_grid

    columns = columns or math.ceil(math.sqrt(len(images)))
    grid = make_grid(images, nrow=columns, padding=1, pad_value=128)
    picture = Image.fromarray(grid.permute(1, 2, 0).numpy())
    factor = max(1, math.ceil(smallest / picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)

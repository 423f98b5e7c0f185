import pytest
import torch

from src.data.codec import Codec, Pixels

BYTES = torch.arange(256, dtype=torch.uint8)
PIXELS = Pixels((1, 1, 1))


def test_encode_maps_bytes_linearly_to_minus_one_to_one():
    assert PIXELS.encode(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
    assert PIXELS.encode(BYTES).dtype == torch.float32
    assert torch.allclose(
        PIXELS.encode(BYTES).double(), torch.linspace(-1, 1, 256, dtype=torch.float64), atol=1e-7
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_exact_for_every_byte(dtype):
    assert torch.equal(PIXELS.decode(PIXELS.encode(BYTES).to(dtype)), BYTES)


def test_rounds_to_the_nearest_and_clips():
    step = 2 / 255
    x = torch.tensor([-1.5, -1 + 0.49 * step, -1 + 0.51 * step, 1 - 0.49 * step, 1.5])
    assert PIXELS.decode(x).tolist() == [0, 0, 1, 255, 255]


def test_half_precision_is_computed_in_float32():
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0], dtype=torch.bfloat16)
    assert torch.equal(PIXELS.decode(x), PIXELS.decode(x.float()))


def test_arguments_are_not_modified():
    images, x = BYTES.clone(), torch.tensor([0.25])
    PIXELS.encode(images)
    PIXELS.decode(x)
    assert torch.equal(images, BYTES)
    assert x.item() == 0.25


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="uint8"):
        PIXELS.encode(torch.zeros(1))
    with pytest.raises(TypeError, match="floating"):
        PIXELS.decode(BYTES)


class Halved(Codec):
    """Encodes pairs of pixels as two channels, so that `shape` differs from `image_shape`."""

    def __init__(self, image_shape):
        channels, height, width = image_shape
        self.image_shape, self.shape = image_shape, (2 * channels, height, width // 2)

    def encode(self, images):
        x = Pixels(self.image_shape).encode(images)
        return torch.cat([x[..., 0::2], x[..., 1::2]], dim=1)

    def decode(self, x):
        left, right = Pixels(self.shape).decode(x).chunk(2, dim=1)
        return torch.stack([left, right], dim=-1).flatten(-2)

    def describe(self):
        return "pairs of pixels as channels"


def test_a_codec_may_change_the_shape():
    images = torch.randint(256, (5, 1, 4, 6), dtype=torch.uint8)
    codec = Halved((1, 4, 6))
    assert codec.encode(images).shape == (5, *codec.shape) == (5, 2, 4, 3)
    assert torch.equal(codec.decode(codec.encode(images)), images)

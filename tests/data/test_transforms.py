import pytest
import torch

from src.data.transforms import to_model_range, to_uint8

BYTES = torch.arange(256, dtype=torch.uint8)


def test_ends_and_middle():
    assert to_model_range(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
    assert to_model_range(BYTES).dtype == torch.float32
    assert torch.allclose(
        to_model_range(BYTES).double(), torch.linspace(-1, 1, 256, dtype=torch.float64), atol=1e-7
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_exact_for_every_byte(dtype):
    assert torch.equal(to_uint8(to_model_range(BYTES).to(dtype)), BYTES)


def test_rounds_to_the_nearest_and_clips():
    step = 2 / 255
    x = torch.tensor([-1.5, -1 + 0.49 * step, -1 + 0.51 * step, 1 - 0.49 * step, 1.5])
    assert to_uint8(x).tolist() == [0, 0, 1, 255, 255]


def test_half_precision_is_computed_in_float32():
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0], dtype=torch.bfloat16)
    assert torch.equal(to_uint8(x), to_uint8(x.float()))


def test_arguments_are_left_alone():
    images, x = BYTES.clone(), torch.tensor([0.25])
    to_model_range(images)
    to_uint8(x)
    assert torch.equal(images, BYTES)
    assert x.item() == 0.25


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="uint8"):
        to_model_range(torch.zeros(1))
    with pytest.raises(TypeError, match="floating"):
        to_uint8(BYTES)

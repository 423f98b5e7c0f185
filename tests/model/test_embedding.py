import numpy as np
import pytest
import torch

from src.model.embedding import sinusoidal_embedding


@pytest.mark.parametrize("dim", [4, 32, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_equals_the_formula_in_float64(dim, dtype):
    label = torch.tensor([0, 1, 17, 500, 999], dtype=dtype)
    if dtype.is_floating_point:
        label[2] += 0.25

    half = dim // 2
    frequency = 10000.0 ** (-np.arange(half) / (half - 1))
    angle = np.outer(label.numpy().astype(np.float64), frequency)
    expected = np.concatenate((np.sin(angle), np.cos(angle)), axis=1)

    embedding = sinusoidal_embedding(label, dim)
    assert embedding.dtype == torch.float32
    # float32 represents an angle of 999 with a spacing of 6e-5
    np.testing.assert_allclose(embedding.numpy(), expected, rtol=0, atol=2e-4)
    np.testing.assert_allclose(embedding[:2].numpy(), expected[:2], rtol=0, atol=1e-6)


def test_autocast_does_not_round_it():
    label = torch.tensor([0.0, 333.0, 999.0])
    with torch.autocast("cpu", torch.bfloat16):
        embedding = sinusoidal_embedding(label, 32)
    assert torch.equal(embedding, sinusoidal_embedding(label, 32))

"""Conditioning on the low resolution: its formula, its noise and its samples."""

import numpy as np
import pytest
import torch
from PIL import Image

from src.conditioning import Condition, LowResolution
from tests.diffusion.test_measurement import random


def test_the_condition_is_the_mean_of_blocks_enlarged_by_bicubic_interpolation():
    x0 = random(2, 3, 4, 6)
    condition = LowResolution(2).of_data(Condition(labels=torch.zeros(2)), x0)
    assert condition.kinds == {"image"}
    low = x0.view(2, 3, 2, 2, 3, 2).mean(dim=(3, 5))
    torch.testing.assert_close(LowResolution(2).low(x0), low)
    assert condition.image.shape == x0.shape
    # Pillow's bicubic kernel has a = -0.5, torch's -0.75: equal for images that are constant
    torch.testing.assert_close(LowResolution(2).of_low(torch.ones(1, 1, 2, 3)).image, torch.ones(1, 1, 4, 6))
    smooth = np.linspace(0, 1, 12, dtype=np.float32)[None].repeat(12, 0)
    pillow = np.asarray(Image.fromarray(smooth).resize((24, 24), Image.Resampling.BICUBIC))
    ours = LowResolution(2).of_low(torch.from_numpy(smooth)[None, None]).image[0, 0]
    torch.testing.assert_close(ours[:, 4:-4], torch.from_numpy(pillow.copy())[:, 4:-4], rtol=0, atol=5e-3)


def test_noise_is_keyed_by_position_and_added_in_training_only():
    conditioning = LowResolution(2, noise=0.5)
    x0 = torch.zeros(6, 1, 8, 8)
    positions = torch.arange(12, 18)
    whole = conditioning.of_training(Condition(), x0, positions, 0, 6).image
    parts = [
        conditioning.of_training(Condition(), x0[some], positions[some], 0, 6).image
        for some in (slice(0, 2), slice(2, 6))
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, conditioning.of_training(Condition(), x0, positions, 1, 6).image)
    assert conditioning.of_data(Condition(), x0).image.count_nonzero() == 0
    many = conditioning.of_training(Condition(), torch.zeros(2000, 1, 4, 4), torch.arange(2000), 0, 2000)
    # the standard deviation of u z for u uniform in [0, 0.5] is 0.5 / sqrt(3); of_low is linear in the low resolution
    low = LowResolution(2).low(many.image)
    assert many.image.mean().abs() < 0.02
    assert 0.2 < low.std() < 0.32
    spreads = low.flatten(1).std(dim=1)
    assert spreads.min() < 0.02 < 0.4 < spreads.max()


def test_dropped_images_are_zero():
    conditioning = LowResolution(2, dropout=0.5)
    image = conditioning.of_training(Condition(), torch.ones(64, 1, 4, 4), torch.arange(64), 0, 64).image
    kept = image.flatten(1).any(dim=1)
    assert 16 < kept.sum() < 48
    torch.testing.assert_close(image[kept], torch.ones_like(image[kept]))


def test_samples_have_the_low_resolution_of_examples():
    x0 = random(3, 1, 4, 4)
    conditioning = LowResolution(2, examples=lambda indices: x0[[i % 3 for i in indices]])
    found = conditioning.of_samples([4, 0], 0)
    assert torch.equal(found.image, conditioning.of_data(Condition(), x0[[1, 0]]).image)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowResolution(1), "factor must be at least 2, got 1"),
        (lambda: LowResolution(noise=-1.0), "noise must be at least 0"),
        (
            lambda: LowResolution(3).check((1, 8, 8)),
            "factor=3 must divide the height and width of the images, 8 x 8",
        ),
        (lambda: LowResolution(2).of_samples([0], 0), "examples are needed"),
    ],
)
def test_what_does_not_suit_is_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()

"""Geometric augmentation: exact movements of pixels, the network's input, and keyed draws."""

import math

import pytest
import torch

from src.conditioning import Condition, GeometricAugmentation
from src.conditioning.augmentation import inputs, transformed
from src.randomness import generator


def numbers(**chosen: float) -> torch.Tensor:
    """a0, ..., a7 of one image, zero but for the chosen ones."""
    values = torch.zeros(1, 8, dtype=torch.float64)
    for name, value in chosen.items():
        values[0, int(name[1])] = value
    return values


def image(height=8, width=8):
    return torch.rand(1, 2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_known_transformations_move_pixels_exactly():
    x = image()
    assert torch.equal(transformed(x, numbers()), x)
    assert torch.equal(transformed(x, numbers(a0=1)), x.flip(3))
    assert torch.equal(transformed(x, numbers(a1=1)), x.flip(2))
    close(transformed(x, numbers(a3=math.pi / 2)), x.rot90(1, (2, 3)))  # counterclockwise
    close(transformed(x, numbers(a3=math.pi)), x.rot90(2, (2, 3)))
    right = transformed(x, numbers(a6=2))  # 2/8 of 8 pixels
    close(right[..., 2:], x[..., :-2])
    close(right[..., :2], x[..., :2].flip(3))  # mirrored
    down = transformed(x, numbers(a7=3))
    close(down[..., 3:, :], x[..., :-3, :])
    # flips come first, then rotation, then translation
    close(transformed(x, numbers(a0=1, a3=math.pi / 2, a6=2))[..., 2:], x.flip(3).rot90(1, (2, 3))[..., :-2])
    single = transformed(x.float(), numbers(a3=math.pi / 2))
    torch.testing.assert_close(single, x.rot90(1, (2, 3)).float(), rtol=0, atol=1e-5)


def test_images_that_are_not_square_keep_their_shape_and_angles():
    x = image(6, 10)
    right = transformed(x, numbers(a6=8 / 10))  # 1 pixel
    close(right[..., 1:], x[..., :-1])
    turned = transformed(x, numbers(a3=math.pi / 2))
    close(turned[..., :, 2:-2], x[..., :, 2:-2].rot90(1, (2, 3)))


def test_scaling_and_anisotropy_stretch_by_powers_of_two():
    """By 3 and 1/3, with which pixels come from pixels: of 16 x 16, those at 1.5, 4.5, ... from 0.5, 1.5, ..."""
    x, third = image(16, 16), 5 * math.log2(3)
    inner, spread = slice(5, 11), slice(0, 16, 3)
    close(transformed(x, numbers(a2=-third))[..., inner, inner], x[..., spread, spread])
    close(transformed(x, numbers(a2=third))[..., spread, spread], x[..., inner, inner])
    close(transformed(x, numbers(a5=third))[..., inner, spread], x[..., spread, inner])
    close(transformed(x, numbers(a5=third, a4=math.pi / 2))[..., spread, inner], x[..., inner, spread])


def test_all_transformations_together():
    """On linear functions, of which cubic interpolation is correct to 0.05: where each pixel comes from."""
    y, x = torch.meshgrid(*[torch.arange(32, dtype=torch.float64) - 15.5] * 2, indexing="ij")
    a = numbers(a0=1, a2=1.0, a3=0.5, a4=0.3, a5=-1.0, a6=0.25, a7=-0.5)
    found = transformed(torch.stack((x, y))[None], a)[0, :, 12:-12, 12:-12].flatten(1)
    # forward, in the order of the paper's table
    at = torch.stack((-found[0], found[1])) * 2**0.2

    def turn(angle, v):
        cos, sin = math.cos(angle), math.sin(angle)
        return torch.stack((cos * v[0] - sin * v[1], sin * v[0] + cos * v[1]))

    at = turn(-0.5, at)
    along, across = turn(-0.3, at)
    at = turn(0.3, torch.stack((along * 2**-0.2, across * 2**0.2)))
    at = at + torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    pixels = torch.stack((x, y))[:, 12:-12, 12:-12].flatten(1)
    torch.testing.assert_close(at, pixels, rtol=0, atol=0.1)


def test_the_input_describes_what_was_done():
    a = torch.tensor([[1.0, 0, -2, 0.3, 0.7, 1.5, -1, 0.5]], dtype=torch.float64)
    expected = [1, 0, -2, math.cos(0.3) - 1, math.sin(0.3), 1.5 * math.cos(0.7), 1.5 * math.sin(0.7), -1, 0.5]
    assert inputs(a)[0].tolist() == pytest.approx(expected, rel=1e-12)
    assert not inputs(numbers()).any()


def test_the_draws_have_their_distributions():
    n = 40_000
    drawn = GeometricAugmentation(0.25).draw(n, generator(0, "augmentation", 0))
    assert drawn.shape == (n, 8)
    error = 4 / math.sqrt(n)
    assert set(drawn[:, :2].unique().tolist()) == {0, 1}
    assert drawn[:, 0].mean() == pytest.approx(0.5, abs=error)  # flips in x are always drawn
    assert drawn[:, 1].mean() == pytest.approx(0.125, abs=error)
    for columns in ([2], [3], [4, 5], [6, 7]):  # scaling, rotation, anisotropy, translation
        applied = drawn[:, columns] != 0
        assert applied.double().mean() == pytest.approx(0.25, abs=error)
        assert (applied.any(1) == applied.all(1)).all()
    for column in (2, 5, 6, 7):
        values = drawn[:, column][drawn[:, column] != 0]
        assert values.mean() == pytest.approx(0, abs=2.5 * error)
        assert values.std() == pytest.approx(1, abs=2.5 * error)
    for column in (3, 4):
        values = drawn[:, column][drawn[:, column] != 0]
        assert values.abs().max() <= math.pi
        assert values.std() == pytest.approx(math.pi / math.sqrt(3), abs=6 * error)
    assert torch.corrcoef(drawn.T).triu(1).abs()[0].max() < error


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("flip_x", [0]),
        ("flip_y", [1]),
        ("scaling", [2]),
        ("rotation", [3]),
        ("anisotropy", [4, 5]),
        ("translation", [6, 7]),
    ],
)
def test_a_transformation_that_is_left_out_changes_no_other(name, columns):
    every, some = (
        GeometricAugmentation(1.0, without).draw(50, generator(0, "test", 0)) for without in ((), [name])
    )
    assert (every[:, columns] != 0).any()
    every[:, columns] = 0
    assert torch.equal(some, every)


def test_an_unknown_transformation_is_refused():
    with pytest.raises(ValueError, match=r"there is no shear; choose from flip_x"):
        GeometricAugmentation(without=["shear"])


def test_images_and_inputs_are_those_of_the_position():
    augmentation = GeometricAugmentation(0.5)
    x, positions = torch.randn(12, 1, 8, 8), torch.arange(20, 32)
    images, given = augmentation(x, positions, seed=1, batch_size=8)
    assert given.shape == (12, augmentation.channels)
    assert given.dtype == torch.float32
    changed = (images != x).flatten(1).any(1)
    assert torch.equal(changed, given.any(1))
    assert 0 < changed.sum() < 12 or changed.all()
    for rows in (slice(0, 5), slice(5, 12)):
        part, of_part = augmentation(x[rows], positions[rows], seed=1, batch_size=8)
        assert torch.equal(part, images[rows])
        assert torch.equal(of_part, given[rows])
    other, _ = augmentation(x, positions, seed=2, batch_size=8)
    assert not torch.equal(other, images)


def test_probability_0_changes_nothing():
    x = torch.randn(8, 1, 8, 8)
    images, given = GeometricAugmentation(0.0)(x, torch.arange(8), seed=0, batch_size=8)
    assert torch.equal(images, x)
    assert not given.any()
    with pytest.raises(ValueError, match=r"^probability must be in \[0, 1\], got 1.5"):
        GeometricAugmentation(1.5)


def test_a_dropped_condition_keeps_the_augmentation():
    condition = Condition(labels=torch.tensor([0, 1]), augment=torch.randn(2, 9))
    assert condition.kinds == {"labels", "augment"}
    assert torch.equal(condition.dropped().augment, condition.augment)
    assert torch.equal(condition.index([1]).augment, condition.augment[1:])
    assert condition.only(frozenset({"labels"})).augment is None

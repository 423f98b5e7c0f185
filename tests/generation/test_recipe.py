"""The images of a recipe do not depend on the number of ranks or the batch size."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from src.conditioning import ByClass
from src.data.codec import Codec, Pixels
from src.diffusion.clipping import StaticClipping
from src.diffusion.denoiser import Denoiser, WrappedDenoiser
from src.diffusion.parameterization import Eps
from src.diffusion.sampler import DDIM, DDPM
from src.diffusion.schedule import Cosine
from src.diffusion.spacing import Trailing
from src.diffusion.variance import Large
from src.generation.recipe import Recipe
from src.model import UNet

N = 30


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    network = UNet(image_size=8, channels=3, base_channels=8, channel_multipliers=[1, 2], groups=4).eval()
    for weight in network.parameters():  # as in a trained network: the last layer is initialised to zero
        torch.nn.init.normal_(weight, std=0.1)
    return Denoiser(network, Cosine(), Eps())


def drawn(sampler, denoiser, share, batch_size):
    """The images with the indices in `share`, uint8, by index."""
    recipe = recipe_of(sampler, StaticClipping)
    made = list(recipe.images(denoiser, share, batch_size))
    assert all(batch.evaluations == 20 for batch in made)
    return dict(zip(share, torch.cat([batch.images for batch in made]), strict=True))


def recipe_of(sampler, *wrappers, steps=20):
    """A recipe for images of 3 x 8 x 8 pixels."""
    return Recipe(sampler, Trailing(), steps, wrappers, Pixels((3, 8, 8)), None, seed=0)


@pytest.mark.parametrize("sampler", [DDIM(), DDPM()], ids=["ddim", "ddpm"])
@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 1), (1, 7), (2, 8), (3, 4)])
def test_images_do_not_depend_on_ranks_and_batches(denoiser, sampler, ranks, batch_size):
    whole = drawn(sampler, denoiser, range(N), N)
    parts = {}
    for rank in range(ranks):  # the split that `TrackFidelity` uses
        parts |= drawn(sampler, denoiser, range(rank, N, ranks), batch_size)
    assert parts.keys() == whole.keys()
    equal = torch.stack([parts[i] == whole[i] for i in whole]).double().mean().item()
    assert equal >= 0.9999
    assert torch.stack(list(whole.values())).double().std() > 10, "the images are almost constant"


@pytest.mark.parametrize("labels", ["balanced", "random", [1, 1, 2]])
def test_classes_do_not_depend_on_ranks_and_batches(labels):
    network = UNet(
        image_size=8, channels=3, num_classes=3, base_channels=8, channel_multipliers=[1, 2], groups=4
    )
    denoiser = Denoiser(network.eval(), Cosine(), Eps())
    conditioning = ByClass(3).with_labels(labels)
    recipe = replace(recipe_of(DDIM(), steps=1), conditioning=conditioning, seed=4)
    whole = recipe.labels(range(N))
    for share in (range(0, N, 2), range(1, N, 2)):
        found = torch.cat([batch.labels for batch in recipe.images(denoiser, share, 7)])
        assert torch.equal(found, whole[list(share)])
        assert torch.equal(found, recipe.start(denoiser, share).condition.labels)


@pytest.mark.parametrize(
    ("num_classes", "labels", "n", "columns", "caption"),
    [
        (10, "balanced", 64, 10, "columns: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        (2, "balanced", 16, 4, "columns: 0, 1, 0, 1"),
        (10, [3, 5, 5], 12, 3, "columns: 3, 5, 5"),
        (10, [3], 12, None, "class: 3"),
        (10, "balanced", 4, None, "row by row: 0, 1, 2, 3"),
        (100, "balanced", 200, None, None),
    ],
)
def test_columns_of_a_grid_follow_the_classes(num_classes, labels, n, columns, caption):
    conditioning = ByClass(num_classes).with_labels(labels)
    recipe = replace(recipe_of(DDIM()), conditioning=conditioning)
    assert recipe.columns(n) == columns
    if columns:
        rows = recipe.labels(range(n - n % columns)).reshape(-1, columns)
        assert (rows == rows[0]).all()
    if caption:
        assert recipe.caption(n, [str(k) for k in range(num_classes)]) == caption
    assert recipe_of(DDIM()).columns(n) is None
    assert recipe_of(DDIM()).caption(n, []) is None


@pytest.mark.parametrize("batch_size", [1, 7])
def test_noise_is_bit_identical(denoiser, batch_size):
    recipe = recipe_of(DDPM())
    whole, _, noise = recipe.start(denoiser, range(N))
    later = noise(whole)
    for start in range(0, N, batch_size):
        share = range(N)[start : start + batch_size]
        x_T, _, noise = recipe.start(denoiser, share)
        assert torch.equal(x_T, whole[start : start + batch_size])
        assert torch.equal(noise(x_T), later[start : start + batch_size])


class Doubled(WrappedDenoiser):
    """Calls the network twice, as guidance does, and scales the mean x0 by `factor`."""

    def __init__(self, inner, factor):
        super().__init__(inner)
        self.factor = factor

    def forward(self, x_t, level, condition=None, to=None):
        first, second = (self.inner(x_t, level, condition, to) for _ in range(2))
        return first.with_x0(self.factor * (first.x0 + second.x0) / 2)


def test_wrappers_act_in_order_and_their_evaluations_are_counted(denoiser):
    guided = partial(Doubled, factor=3.0)
    start = torch.randn(2, 3, 8, 8)
    level = denoiser.schedule([500.0]).scalars()[0]
    plain = denoiser(start, level).x0
    clipped_last = recipe_of(DDIM(), guided, StaticClipping).around(denoiser)(start, level).x0
    torch.testing.assert_close(clipped_last, (3 * plain).clamp(-1, 1))
    clipped_first = recipe_of(DDIM(), StaticClipping, guided).around(denoiser)(start, level).x0
    torch.testing.assert_close(clipped_first, 3 * plain.clamp(-1, 1))
    assert not torch.allclose(clipped_first, clipped_last)
    (made,) = recipe_of(DDIM(), guided, StaticClipping, steps=5).images(denoiser, range(4), 4)
    assert made.evaluations == 10
    (made,) = recipe_of(DDPM(), guided, guided, steps=5).images(denoiser, range(4), 4)
    assert made.evaluations == 20


def test_wrapper_has_the_schedule_and_variance_of_the_inner_denoiser(denoiser):
    outer = Doubled(Doubled(denoiser, 1.0), 1.0)
    before = denoiser.variance
    try:
        denoiser.variance = Large()
        assert outer.variance is denoiser.variance
        assert outer.schedule is denoiser.schedule
    finally:
        denoiser.variance = before


def test_record_describes_the_recipe(denoiser):
    record = recipe_of(DDIM(0.5), partial(Doubled, factor=2.0), StaticClipping).record(Large(), 40)
    assert record == {
        "sampler": "DDIM(eta=0.5)",
        "spacing": "Trailing()",
        "variance": "Large()",
        "guidance": "Doubled(factor=2.0)",
        "clipping": "StaticClipping()",
        "labels": "none",
        "steps": 20,
        "network_evaluations": 40,
        "seed": 0,
    }


class Upright(Codec):
    """Encodes images of 2 x 2 pixels as four channels of 1 x 1, so that `shape` differs from `image_shape`."""

    image_shape, shape = (1, 2, 2), (4, 1, 1)

    def encode(self, images):
        return Pixels(self.image_shape).encode(images).reshape(-1, *self.shape)

    def decode(self, x):
        return Pixels(self.image_shape).decode(x.reshape(-1, *self.image_shape))

    def describe(self):
        return "four pixels as channels"


def test_sampling_uses_the_codec_shape_and_returns_the_image_shape():
    class Mild(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.full((4, 1, 1), 0.1))

        def forward(self, x, label, condition=None):
            assert x.shape[1:] == Upright.shape
            return self.scale * x

    recipe = Recipe(DDIM(), Trailing(), 4, (), Upright(), None, seed=0)
    (made,) = recipe.images(Denoiser(Mild(), Cosine(), Eps()).requires_grad_(False), range(3), 8)
    assert made.images.shape == (3, 1, 2, 2)
    assert made.images.dtype == torch.uint8


def test_the_condition_of_a_batch_is_made_once():
    asked = []

    class Counted(ByClass):
        def of_samples(self, indices, seed):
            asked.append(list(indices))
            return super().of_samples(indices, seed)

    network = UNet(
        image_size=8, channels=3, num_classes=3, base_channels=8, channel_multipliers=[1, 2], groups=4
    )
    recipe = replace(recipe_of(DDIM(), steps=1), conditioning=Counted(3))
    made = list(recipe.images(Denoiser(network.eval(), Cosine(), Eps()), range(4), 2))
    assert [batch.labels.tolist() for batch in made] == [[0, 1], [2, 0]]
    assert asked == [[0, 1], [2, 3]]


@pytest.mark.parametrize("sampler", [DDIM(), DDPM()], ids=["ddim", "ddpm"])
def test_noise_drawn_on_the_device_is_keyed_by_image(denoiser, sampler):
    """On the CPU, whose numbers are those of the default."""
    recipe = replace(recipe_of(sampler, StaticClipping, steps=3), device_noise=True)
    whole = recipe.start(denoiser, range(6))
    part = recipe.start(denoiser, [4, 2])
    for _ in range(3):
        assert torch.equal(part.x_T, whole.x_T[[4, 2]])
        part, whole = (start._replace(x_T=start.noise(start.x_T)) for start in (part, whole))
    by_batch = [
        torch.cat([made.images for made in recipe.images(denoiser, range(6), size)]) for size in (6, 1)
    ]
    assert (by_batch[0] == by_batch[1]).double().mean() >= 0.9999

"""Encoding and decoding, interpolation, and starting from an image."""

import math
from itertools import pairwise

import pytest
import torch

from src.diffusion.sampler import DDIM, encode, renoise, slerp
from src.diffusion.schedule import EDM, Cosine, Linear, RectifiedFlow
from src.diffusion.spacing import Karras, Linspace, Trailing
from src.errors import UserError
from tests.diffusion.mixture import MixtureDenoiser, three_modes
from tests.diffusion.sampler.networks import recorded_noise

IMAGES, _ = three_modes().sample(64, torch.Generator().manual_seed(2))


def _round_trip(schedule, times, **options):
    denoiser = MixtureDenoiser(three_modes(), schedule)
    *_, state = encode(denoiser, IMAGES, times, **options)
    assert state.evaluations == denoiser.calls
    return (DDIM()(denoiser, state.x, times) - IMAGES).square().mean().sqrt().item(), state.x


@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=lambda s: type(s).__name__)
def test_round_trip_error_is_small_and_of_order_one(schedule):
    errors = [_round_trip(schedule, Linspace()(schedule, steps))[0] for steps in (125, 250, 500, 1000)]
    assert errors[-1] < 1e-2
    slope = math.log2(errors[0] / errors[-1]) / 3
    assert slope == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("schedule", "spacing"),
    [
        (Linear(), Trailing()),
        (Cosine(), Trailing()),
        (EDM(), Karras()),
        (RectifiedFlow(t_max=0.999), Trailing()),
    ],
    ids=lambda part: type(part).__name__,
)
def test_round_trip_to_fixed_points_returns_the_image(schedule, spacing):
    error, _ = _round_trip(schedule, spacing(schedule, 50), tolerance=1e-11)
    assert error < 1e-6


def test_latents_are_standard_normal():
    # the ODE maps data to latents distributed as N(0, sigma_T^2)
    denoiser = MixtureDenoiser(three_modes(), Cosine())
    images, _ = three_modes().sample(4000, torch.Generator().manual_seed(3))
    *_, state = encode(denoiser, images, Linspace()(Cosine(), 200))
    latents = state.x.flatten(1)
    assert latents.mean(dim=0).abs().max() < 4 / 4000**0.5 + 0.02
    assert torch.allclose(latents.T.cov(), torch.eye(2).double(), atol=4 * (2 / 4000) ** 0.5 + 0.03)


def test_unreachable_tolerance_is_an_error():
    with pytest.raises(ValueError, match=r"^tolerance=1e-30 is not reached in 1,000 iterations"):
        _round_trip(Cosine(), [1000.0, 500.0, 0.0], tolerance=1e-30)
    with pytest.raises(ValueError, match=r"^tolerance must be positive"):
        _round_trip(Cosine(), [1000.0, 500.0, 0.0], tolerance=0.0)
    with pytest.raises(ValueError, match=r"^times must be at least two decreasing values"):
        _round_trip(Cosine(), [0.0, 500.0])


@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_latents_that_are_not_finite_are_an_error(tolerance):
    class Diverged(MixtureDenoiser):
        def forward(self, x_t, level, condition=None):
            return super().forward(x_t * (math.nan if level.label == 599 else 1.0), level)

    denoiser = Diverged(three_modes(), Linear())
    times = [1000.0, 800.0, 600.0, 400.0, 200.0, 0.0]
    with pytest.raises(UserError, match=r"^encoding: the latents are not finite"):
        list(encode(denoiser, IMAGES, times, tolerance=tolerance))
    assert denoiser.calls < 1000  # NaN stops the fixed-point iteration


def test_each_step_uses_eps_at_its_first_level():
    schedule = Cosine()
    denoiser = MixtureDenoiser(three_modes(), schedule)
    times = [900.0, 500.0, 100.0]
    states = [state.x for state in encode(denoiser, IMAGES, times)]
    for (s, t), (x_s, x_t) in zip(pairwise(reversed(times)), pairwise(states), strict=True):
        (of_s,), (of_t,) = schedule([s]).scalars(), schedule([t]).scalars()
        eps = denoiser(x_s, of_s).eps
        # Song et al. 2021, eq. 12 with eta 0, from s up to t
        x0 = (x_s - of_s.sigma * eps) / of_s.alpha
        torch.testing.assert_close(x_t, of_t.alpha * x0 + of_t.sigma * eps)


def test_clean_images_are_evaluated_at_the_first_level():
    schedule = Cosine()
    denoiser = MixtureDenoiser(three_modes(), schedule)
    (first,) = schedule([300.0]).scalars()
    _, state = encode(denoiser, IMAGES, [300.0, 0.0])
    torch.testing.assert_close(state.x, first.alpha * IMAGES + first.sigma * denoiser(IMAGES, first).eps)


def _latents():
    return recorded_noise(0)(torch.empty(8, 3, 4, 4)), recorded_noise(1)(torch.empty(8, 3, 4, 4))


def test_slerp_follows_the_great_circle():
    a, b = (x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in _latents())
    angle = (a * b).flatten(1).sum(dim=1).acos()
    for weight in (0.0, 0.25, 0.5, 1.0):
        c = slerp(a, b, weight)
        torch.testing.assert_close(c.flatten(1).norm(dim=1), torch.ones(8).double())
        torch.testing.assert_close(
            (a * c).flatten(1).sum(dim=1).clamp(-1, 1).acos(), weight * angle, atol=1e-7, rtol=0
        )


def test_slerp_of_end_points_parallel_vectors_and_weights_per_image():
    a, b = _latents()
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, 3 * a, 0.5), 2 * a)
    weights = torch.linspace(0, 1, 8)
    for i, c in enumerate(slerp(a, b, weights)):
        torch.testing.assert_close(
            c, slerp(a[i : i + 1], b[i : i + 1], weights[i].item())[0], rtol=1e-6, atol=1e-6
        )


def test_renoise_is_the_forward_process_at_the_remaining_times():
    schedule = Linear()
    denoiser = MixtureDenoiser(three_modes(), schedule)
    times = Trailing()(schedule, 10)
    x, remaining = renoise(denoiser, IMAGES, times, 0.4, recorded_noise(5))
    assert remaining.tolist() == [400.0, 300.0, 200.0, 100.0, 0.0]
    level = schedule(remaining[:1])
    torch.testing.assert_close(x, level.alpha * IMAGES + level.sigma * recorded_noise(5)(IMAGES))
    assert renoise(denoiser, IMAGES, times, 1.0)[1].tolist() == times.tolist()
    # the less noise is added, the closer the denoised images are to the originals
    distances = []
    for strength in (0.1, 0.5, 1.0):
        images = DDIM()(denoiser, *renoise(denoiser, IMAGES, times, strength, recorded_noise(5)))
        distances.append((images - IMAGES).square().mean().item())
    assert distances == sorted(distances)
    for wrong in (0.0, 0.05, 1.5):
        with pytest.raises(ValueError, match=r"^strength must be in \[1/steps, 1\]"):
            renoise(denoiser, IMAGES, times, wrong)

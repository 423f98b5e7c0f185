import pytest
import torch

from src.diffusion.clipping import DynamicThresholding, StaticClipping
from src.diffusion.schedule import Linear
from tests.diffusion.mixture import MixtureDenoiser, gaussian


def _case():
    schedule = Linear()
    denoiser = MixtureDenoiser(gaussian(1.0, 2.0, (1, 4, 4)), schedule)
    x_t = torch.randn(8, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    return denoiser, x_t, schedule(torch.tensor([300.0])).scalars()[0]


def test_static_clipping_bounds_x0_and_keeps_it_consistent_with_eps():
    denoiser, x_t, level = _case()
    raw, clipped = denoiser(x_t, level), StaticClipping(denoiser)(x_t, level)
    assert raw.x0.abs().max() > 1
    assert torch.equal(clipped.x0, raw.x0.clamp(-1, 1))
    torch.testing.assert_close(level.alpha * clipped.x0 + level.sigma * clipped.eps, x_t)


def test_invalid_bound_is_refused():
    with pytest.raises(ValueError, match=r"^bound must be positive"):
        StaticClipping(_case()[0], 0.0)


def test_dynamic_thresholding_equals_imagen():
    denoiser, x_t, level = _case()
    raw = denoiser(x_t, level)
    for quantile in (0.5, 0.9, 0.995, 1.0):
        ours = DynamicThresholding(denoiser, quantile)(x_t, level)
        s = torch.quantile(raw.x0.abs().flatten(1), quantile, dim=1).clamp(min=1).view(-1, 1, 1, 1)
        torch.testing.assert_close(ours.x0, raw.x0.clamp(-s, s) / s)
        torch.testing.assert_close(level.alpha * ours.x0 + level.sigma * ours.eps, x_t)
    assert (raw.x0.abs().amax((1, 2, 3)) > 1).any()


def test_dynamic_thresholding_agrees_with_diffusers():
    from diffusers import DDPMScheduler

    denoiser, x_t, level = _case()
    scheduler = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=100.0)
    expected = scheduler._threshold_sample(denoiser(x_t, level).x0)
    ours = DynamicThresholding(denoiser, 0.9)(x_t, level).x0
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_images_in_range_are_unchanged():
    schedule = Linear()
    denoiser = MixtureDenoiser(gaussian(0.0, 0.1, (1, 4, 4)), schedule)
    x_t = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    level = schedule(torch.tensor([300.0])).scalars()[0]
    assert torch.equal(DynamicThresholding(denoiser)(x_t, level).x0, denoiser(x_t, level).x0)


def test_invalid_arguments_of_dynamic_thresholding_are_refused():
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"^quantile must be in"):
            DynamicThresholding(_case()[0], wrong)
    with pytest.raises(ValueError, match=r"^bound must be positive"):
        DynamicThresholding(_case()[0], 0.9, -1.0)

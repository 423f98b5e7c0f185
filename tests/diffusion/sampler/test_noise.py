"""Sources of noise: replayed recordings, and noise drawn on the device."""

import pytest
import torch

from src.diffusion.sampler import Heun, PerImageNoise, ReplayedNoise
from src.diffusion.schedule import EDM
from src.diffusion.spacing import Karras
from tests.diffusion.mixture import MixtureDenoiser, three_modes
from tests.diffusion.sampler.networks import recorded_noise, standard_normal

SHAPE = (2, 1, 1, 2)


def test_skip_leaves_out_unused_draws_of_a_recording():
    # EDM's code draws at every step but uses the draw only for sigma in [s_min, s_max]
    denoiser, sampler = MixtureDenoiser(three_modes(), EDM()), Heun(s_churn=40.0, s_min=0.05, s_max=50.0)
    times = Karras()(EDM(), 12)
    noise = recorded_noise()
    recording = [noise(torch.empty(SHAPE)) for _ in range(12)]
    unused = [i for i, sigma in enumerate(times[:-1].tolist()) if not 0.05 <= sigma <= 50.0]
    used = iter([z for i, z in enumerate(recording) if i not in unused])
    assert 0 < len(unused) < 12
    x_T = 80 * recorded_noise(0)(torch.empty(SHAPE))
    expected = sampler(denoiser, x_T, times, noise=lambda x: next(used))
    replayed = sampler(denoiser, x_T, times, noise=ReplayedNoise(recording, skip=unused))
    assert torch.equal(replayed, expected)
    # without `skip`, the recording is shifted
    assert not torch.equal(sampler(denoiser, x_T, times, noise=ReplayedNoise(recording)), expected)


def test_replayed_noise_has_the_dtype_of_the_images_and_refuses_other_shapes():
    noise = ReplayedNoise(iter([standard_normal(SHAPE), standard_normal((3, 1, 1, 2))]))
    assert torch.equal(noise(torch.empty(SHAPE, dtype=torch.float64)), standard_normal(SHAPE).double())
    with pytest.raises(
        ValueError, match=r"^recording has noise of shape \(3, 1, 1, 2\), the images \(2, 1, 1, 2\)"
    ):
        noise(torch.empty(SHAPE))
    with pytest.raises(ValueError, match=r"^recording is exhausted"):
        noise(torch.empty(SHAPE))


def test_noise_is_drawn_on_the_cpu_by_default():
    expected = PerImageNoise(3, [5, 6])(torch.empty(SHAPE))
    assert torch.equal(PerImageNoise(3, [5, 6], device="cpu")(torch.empty(SHAPE)), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_drawn_on_a_gpu_depends_only_on_the_image_index():
    x = torch.empty(4, 3, 8, 8, device="cuda")
    noise, alone = PerImageNoise(3, range(4), device="cuda"), PerImageNoise(3, [2], device="cuda")
    for _ in range(2):
        together = noise(x)
        assert together.device.type == "cuda"
        assert torch.equal(together[2:3], alone(x[:1]))
    assert together.mean().abs() < 5 / together.numel() ** 0.5

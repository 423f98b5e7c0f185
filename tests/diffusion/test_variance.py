"""Mean and variance of the reverse step against the papers' formulas, on full and respaced chains."""

import numpy as np
import pytest
import torch

from src.diffusion.denoiser import Denoiser, posterior_mean
from src.diffusion.parameterization import Eps, Prediction, Velocity
from src.diffusion.sampler import DDPM
from src.diffusion.schedule import Cosine, Linear, RectifiedFlow
from src.diffusion.spacing import Leading
from src.diffusion.variance import Large, Learned, LearnedRange, Small
from tests.diffusion import reference_numpy as reference

T = 1000
TABLES = {
    "linear": (Linear(T), reference.alphabar_of(reference.betas_linear(T))),
    "cosine": (Cosine(T), reference.alphabar_of(reference.betas_cosine(T))),
}
FULL = [(1, 0), (2, 1), (T // 2, T // 2 - 1), (T, T - 1)]
RESPACED = [(1, 0), (21, 1), (501, 481), (1000, 980)]


@pytest.mark.parametrize("steps", [FULL, RESPACED], ids=["full", "respaced"])
@pytest.mark.parametrize("name", TABLES)
def test_posterior(name, steps):
    schedule, alphabar = TABLES[name]
    x0, x_t = np.random.default_rng(0).standard_normal((2, len(steps), 1, 2, 2))
    times, befores = (torch.tensor(column, dtype=torch.float64) for column in zip(*steps, strict=True))
    t, s = schedule(times), schedule(befores)
    mean = posterior_mean(torch.from_numpy(x0), torch.from_numpy(x_t), t, s).numpy()
    small, large = Small()(t, s, None), Large()(t, s, None)
    for i, (a, b) in enumerate(steps):
        expected = reference.posterior_mean(alphabar, a, b, x0[i], x_t[i])
        np.testing.assert_allclose(mean[i], expected, rtol=1e-10)
        np.testing.assert_allclose(large[i], reference.beta_between(alphabar, a, b), rtol=1e-10)
        np.testing.assert_allclose(small[i], reference.posterior_variance(alphabar, a, b), rtol=1e-10)


def test_floats_and_tensors_agree():
    schedule = Linear(T)
    times = torch.tensor([1000.0, 980.0, 1.0, 0.0], dtype=torch.float64)
    grid = schedule(times)
    for i, (t, s) in enumerate(zip(grid.scalars()[:-1], grid.scalars()[1:], strict=True)):
        pair = schedule(times[i : i + 1]), schedule(times[i + 1 : i + 2])
        assert Small()(t, s, None) == pytest.approx(Small()(*pair, None).item(), rel=1e-12)
        assert Large()(t, s, None) == pytest.approx(Large()(*pair, None).item(), rel=1e-12)


@pytest.mark.parametrize("steps", [FULL[1:], RESPACED[1:]], ids=["full", "respaced"])
@pytest.mark.parametrize("name", TABLES)
def test_learned_range_interpolates_on_any_subsequence(name, steps):
    # Nichol & Dhariwal 2021, eq. 15, with beta and beta-tilde of the pair
    schedule, alphabar = TABLES[name]
    v = np.random.default_rng(0).uniform(-1.5, 1.5, (len(steps), 2, 3, 3))
    times, befores = (torch.tensor(column, dtype=torch.float64) for column in zip(*steps, strict=True))
    t, s = schedule(times), schedule(befores)
    x = torch.zeros(v.shape, dtype=torch.float64)
    ours = LearnedRange()(t, s, Prediction(x, t, x, variance=torch.from_numpy(v))).numpy()
    for i, pair in enumerate(steps):
        expected = reference.reverse_variance(alphabar, list(reversed(pair)), 1, "learned_range", v[i])
        np.testing.assert_allclose(ours[i], expected, rtol=1e-10)


class Doubled(torch.nn.Module):
    """Predicts eps = 0 and a constant variance value."""

    def __init__(self, word):
        super().__init__()
        self.word = word

    def forward(self, x, label, condition=None):
        return torch.cat([torch.zeros_like(x), torch.full_like(x, self.word)], dim=1)


@pytest.mark.parametrize(("word", "fixed"), [(-1.0, Small()), (1.0, Large())])
def test_ends_of_the_learned_range_sample_like_the_fixed_variances(word, fixed):
    schedule = Linear(T)
    x_T = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = Leading()(schedule, 20)

    def images(variance):
        torch.manual_seed(1)
        return DDPM()(Denoiser(Doubled(word), schedule, Eps(), variance), x_T, times)

    torch.testing.assert_close(images(LearnedRange()), images(fixed), rtol=1e-10, atol=1e-10)


def test_learned_is_the_log_variance():
    x = torch.zeros(1, 1, 2, 2)
    level = Linear(T)(torch.tensor([5.0]))
    v = torch.tensor([[[[0.0, -1.0], [-2.0, -3.0]]]])
    assert torch.equal(Learned()(level, level, Prediction(x, level, x, variance=v)), v.exp())


def test_network_without_variance_output_is_refused():
    class Plain(torch.nn.Module):
        def forward(self, x, label, condition=None):
            return x

    denoiser = Denoiser(Plain(), Cosine(), Eps(), LearnedRange())
    with pytest.raises(
        ValueError,
        match=r"^variance: LearnedRange is predicted by the network, .* set out_channels=6, or choose Sm",
    ):
        denoiser(torch.zeros(2, 3, 4, 4), Cosine()([500.0]).scalars()[0])


def test_learned_variance_is_refused_for_continuous_schedules():
    with pytest.raises(ValueError, match=r"^variance=learned .* RectifiedFlow: choose variance=small"):
        Denoiser(torch.nn.Identity(), RectifiedFlow(), Velocity(), LearnedRange())


def test_learned_variance_is_refused_for_too_few_output_channels():
    network = torch.nn.Identity()
    network.image_shape, network.out_channels = (3, 8, 8), 3
    with pytest.raises(ValueError, match=r"^model.out_channels=3: .* needs 6 output channels$"):
        Denoiser(network, Linear(), Eps(), LearnedRange())

"""Checks likelihoods against the terms of the papers and against exact densities."""

import math

import numpy as np
import pytest
import torch

from src.diffusion.clipping import StaticClipping
from src.diffusion.denoiser import Denoiser
from src.diffusion.likelihood import (
    Chain,
    bound_terms,
    discretised_log_likelihood,
    flow_likelihood,
    flow_log_density,
)
from src.diffusion.noise_level import broadcast, conditional_variance
from src.diffusion.ode import NotFinite, integrate
from src.diffusion.parameterization import Eps
from src.diffusion.schedule import EDM, VE, VP, ContinuousCosine, Cosine, Linear, RectifiedFlow
from src.diffusion.variance import Large, Learned, LearnedRange, Small, Variance
from tests.diffusion import reference_numpy as reference
from tests.diffusion.mixture import Mixture, MixtureDenoiser, gaussian, three_modes
from tests.diffusion.test_loss import Doubled


class Normal:
    """A source of float64 noise."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, x):
        return torch.randn(x.shape, dtype=torch.float64, generator=self.generator)


def _bound(denoiser, chain, x0, noise):
    """All terms of steps 1 ... S, shape (S, B), and the bound, shape (B,)."""
    steps = torch.stack(list(bound_terms(denoiser, chain, x0, noise=noise)))
    return steps, chain.prior(x0) + steps.sum(dim=0)


def _bytes(shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape) / 127.5 - 1)


def test_decoder_is_a_distribution_over_bytes():
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in [(0.3, 0.004), (-0.999, 0.05), (0.0, 1.0), (1.7, 0.3)]:
        log_p = discretised_log_likelihood(x, torch.full_like(x, mean), torch.tensor(std))
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_decoder_is_accurate_in_the_tails():
    # the log-mass of a bin 100 standard deviations away, from the asymptotic expansion of the normal tail
    x = torch.tensor([0.2, -0.2], dtype=torch.float64)
    x = (x * 127.5).round() / 127.5
    std, mean = 0.002, torch.zeros(2, dtype=torch.float64)
    log_p = discretised_log_likelihood(x, mean, torch.tensor(std, dtype=torch.float64))
    near = (x.abs() - 1 / 255) / std  # z at the nearer edge; the mass beyond is phi(z)/z (1 - 1/z^2 + ...)
    expected = -(near**2) / 2 - math.log(math.sqrt(2 * math.pi)) - near.log() - 1 / near**2
    torch.testing.assert_close(log_p, expected, rtol=1e-7, atol=0)


def test_gradients_are_finite_at_the_open_ends():
    x = torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64)
    mean = torch.tensor([0.9, -0.9, 0.5], dtype=torch.float64, requires_grad=True)
    std = torch.tensor([0.01, 0.01, 0.01], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, s: discretised_log_likelihood(x, m, s), (mean, std))


@pytest.mark.parametrize("byte", [0, 100, 255])
@pytest.mark.parametrize("z", [0.0, 0.3, 3.0, 30.0, 1e3, 1e4, 1e6])
def test_gradients_are_accurate_in_float32(z, byte):
    # in the tail the mass is phi(z)/z, and the derivative of its logarithm with respect to std is z^2/std
    x0, std = torch.tensor([byte / 127.5 - 1]), torch.tensor([0.01 if z < 100 else 1.0])
    gradients = {}
    for dtype in (torch.float32, torch.float64):
        mean = (x0.double() + math.copysign(z, 100 - byte) * std).float()
        parts = [part.to(dtype).requires_grad_() for part in (mean, std)]
        log_p = discretised_log_likelihood(x0.to(dtype), *parts)
        gradients[dtype] = torch.stack([log_p.detach(), *torch.autograd.grad(log_p.sum(), parts)]).double()
    torch.testing.assert_close(gradients[torch.float32], gradients[torch.float64], rtol=1e-4, atol=1e-4)
    if z >= 1e3:
        assert gradients[torch.float32][2].item() == pytest.approx(z**2, rel=1e-2)


@pytest.mark.parametrize("log_variance", [-9.0, -6.0, -4.0, -2.0, 0.0])
@pytest.mark.parametrize("T", [1000, 4000])
def test_decoder_gradient_does_not_leak_into_other_steps(T, log_variance):
    # at t = T of the cosine schedule, eps-prediction errs by 20,000 or more in x0, where the decoder's gradient is
    # infinite
    chain, step, x0 = Chain(Cosine(T)), torch.tensor([1, 2, T // 2, T]), _bytes((4, 1, 4, 4))
    x_t, eps = Normal()(x0), Normal(1)(x0)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        output = eps.to(dtype).requires_grad_()
        predicted = torch.full_like(output, log_variance, requires_grad=True)
        prediction = Eps().predict(x_t.to(dtype), output, chain.level(step)).with_variance(predicted)
        bits = chain.term(step, x0.to(dtype), prediction, Learned())
        gradients.append([g.double() for g in torch.autograd.grad(bits.sum(), (output, predicted))])
    for single, double in zip(*gradients, strict=True):
        torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-6)


KINDS = {"small": Small(), "large": Large(), "learned_range": LearnedRange()}


@pytest.mark.parametrize("times", [list(range(1, 41)), [1, 5, 12, 30, 40]], ids=["full", "respaced"])
@pytest.mark.parametrize("kind", KINDS)
def test_terms_of_the_bound_equal_the_reference(kind, times):
    T = 40
    schedule, alphabar = Cosine(T), reference.alphabar_of(reference.betas_cosine(T))
    x0, recording = _bytes((2, 1, 3, 3)), Normal()
    denoiser = Denoiser(Doubled(), schedule, Eps(), KINDS[kind])
    chain = Chain(schedule, times)
    steps, bound = _bound(denoiser, chain, x0, noise=recording)
    np.testing.assert_allclose(chain.prior(x0), reference.prior_bits(alphabar, T, x0.numpy()), rtol=1e-10)
    replay, expected = Normal(), []
    for i, t in enumerate(times):
        x_t = np.sqrt(alphabar[t]) * x0.numpy() + np.sqrt(1 - alphabar[t]) * replay(x0).numpy()
        eps = np.sin(x_t + (t - 1) / 100)
        x0_hat = (x_t - np.sqrt(1 - alphabar[t]) * eps) / np.sqrt(alphabar[t])
        terms = reference.bound_bits(alphabar, times, i, x0.numpy(), x_t, x0_hat, kind, np.cos(2 * x_t))
        expected.append(terms)
    np.testing.assert_allclose(steps.detach(), np.stack(expected), rtol=1e-10)
    np.testing.assert_allclose(
        bound.detach(), chain.prior(x0).numpy() + np.stack(expected).sum(axis=0), rtol=1e-10
    )


@pytest.mark.parametrize(
    "variance", [Small(), Large(), LearnedRange(), Learned()], ids=lambda v: type(v).__name__
)
def test_a_batch_of_several_steps_has_the_terms_of_each(variance):
    chain, x0, step = Chain(Cosine(40)), _bytes((4, 1, 3, 3)).float(), torch.tensor([1, 2, 1, 40])
    output, predicted, x_t = (
        torch.randn(x0.shape, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )

    def term(chosen):
        prediction = Eps().predict(x_t[chosen], output[chosen], chain.level(step[chosen]))
        return chain.term(step[chosen], x0[chosen], prediction.with_variance(predicted[chosen]), variance)

    assert torch.equal(term([0, 1, 2, 3]), torch.cat([term([i]) for i in range(4)]))
    assert torch.equal(term([0, 2]), term([0, 1, 2, 3])[[0, 2]])


def test_decoder_is_evaluated_only_for_the_first_step():
    class Counting(Small):
        calls = 0

        def decoder(self, t, beta_tilde, prediction):
            self.calls += 1
            return super().decoder(t, beta_tilde, prediction)

    variance = Counting()
    _bound(
        MixtureDenoiser(_pixels(), Linear(50), variance), Chain(Linear(50)), _bytes((8, 1, 1, 1)), Normal()
    )
    assert variance.calls == 1


def _pixels():
    """A mixture over single pixels."""
    return Mixture(
        torch.tensor([-0.4, 0.5], dtype=torch.float64).view(2, 1, 1, 1),
        torch.tensor([0.01, 0.04], dtype=torch.float64),
        torch.tensor([0.4, 0.6], dtype=torch.float64),
    )


def _bytes_of(mixture, n):
    """n single-pixel images drawn from a discretised mixture, and the exact -log2 p of each, shape (n,)."""
    edges = (torch.arange(257, dtype=torch.float64) - 0.5) / 127.5 - 1
    edges[0], edges[-1] = -math.inf, math.inf
    components = zip(mixture.weights, mixture.means.flatten(), mixture.variances, strict=True)
    mass = sum(w * torch.special.ndtr((edges - m) / v.sqrt()) for w, m, v in components).diff()
    chosen = torch.multinomial(mass, n, replacement=True, generator=torch.Generator().manual_seed(0))
    return (chosen / 127.5 - 1).double().view(-1, 1, 1, 1), -mass.log2()[chosen]


class Matched(Variance):
    """The exact variance of q(x_s | x_t) for pixels of a mixture."""

    def __init__(self, mixture):
        self.mixture = mixture

    def __call__(self, t, s, prediction):
        gain = s.alpha * conditional_variance(t, s) / t.sigma**2
        spread = broadcast(gain**2, prediction.x_t) * self._spread(t, prediction)
        return broadcast(Small()(t, s, prediction), prediction.x_t) + spread

    def decoder(self, t, beta_tilde, prediction):
        return self._spread(t, prediction)

    def _spread(self, t, prediction):
        """Var[x0 | x_t] = sigma^2/alpha dE[x0 | x_t]/dx_t (second-order Tweedie formula)."""
        with torch.enable_grad():
            x_t = prediction.x_t.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.mixture.posterior_mean(x_t, t).sum(), x_t)
        return broadcast(t.sigma**2 / t.alpha, x_t) * slope


def test_the_bound_of_a_gaussian_is_tight_on_any_chain():
    # For Gaussian q(x_s | x_t) with exact mean and variance, the gap of the bound is the mismatch of the prior
    # (4e-5 bits at alphabar_T = 4e-5). The sampling error of 20,000 draws is measured.
    data = gaussian(0.1, 0.2)
    schedule = Linear(1000)
    x0, bits = _bytes_of(data, 20_000)
    denoiser = MixtureDenoiser(data, schedule, Matched(data))
    for times in ([1, 3, 10, 30, 100, 300, 1000], [1, 500, 1000]):
        excess = _bound(denoiser, Chain(schedule, times), x0, noise=Normal())[1] - bits
        assert excess.mean().item() == pytest.approx(0, abs=5 * excess.std().item() / len(x0) ** 0.5 + 2e-3)


def test_the_bound_of_a_mixture_approaches_its_exact_likelihood():
    # q(x_s | x_t) is Gaussian only for short steps: the gap of the bound shrinks with the number of steps
    mixture = _pixels()
    x0, bits = _bytes_of(mixture, 4000)
    schedule = Linear(1000)
    denoiser = MixtureDenoiser(mixture, schedule, Matched(mixture))
    excess = [
        _bound(denoiser, Chain(schedule, times), x0, noise=Normal())[1] - bits
        for times in ([1, 300, 1000], list(range(1, 1001, 9)))
    ]
    errors = [e.std().item() / len(x0) ** 0.5 for e in excess]
    assert excess[0].mean() > 5 * errors[0]
    assert excess[1].mean().item() == pytest.approx(0, abs=5 * errors[1] + 5e-3)
    # a fixed variance widens the gap on the same chain
    fixed = MixtureDenoiser(mixture, schedule, Small())
    loose = _bound(fixed, Chain(schedule, list(range(1, 1001, 9))), x0, noise=Normal())[1] - bits
    assert loose.mean() > excess[1].mean() + 0.1


@pytest.mark.parametrize(
    "schedule",
    [
        VP(),
        VE(sigma_max=50),
        VE(sigma_min=0.3),
        EDM(),
        ContinuousCosine(),
        RectifiedFlow(),
        Linear(),
    ],
    ids=lambda s: type(s).__name__,
)
def test_the_flow_gives_the_exact_density(schedule):
    # The Rademacher probe is exact for one-dimensional images. The remaining error is that of the prior
    # N(0, sigma^2) for the diffused mixture, which matters only where alpha/sigma is not small.
    mixture = _pixels()
    x = torch.linspace(-0.8, 1.0, 7, dtype=torch.float64).view(-1, 1, 1, 1)
    first = schedule(torch.tensor([schedule.t_min], dtype=torch.float64)).scalars()[0]
    log_p, _, evaluations = flow_log_density(MixtureDenoiser(mixture, schedule), x, noise=Normal())
    torch.testing.assert_close(log_p, mixture.log_density(x, first), rtol=0, atol=0.02)
    assert evaluations < 1500


def test_flow_maps_data_to_the_prior():
    mixture, schedule = three_modes(), VP()
    x, _ = mixture.sample(2000, torch.Generator().manual_seed(0))
    _, latent, _ = flow_log_density(MixtureDenoiser(mixture, schedule), x, noise=Normal())
    assert latent.mean(dim=0).abs().max() < 5 / 2000**0.5
    torch.testing.assert_close(
        latent.flatten(1).T.cov(), torch.eye(2).double(), rtol=0, atol=5 * (2 / 2000) ** 0.5
    )


def test_hutchinson_estimate_is_unbiased():
    # the mean over 400 probes of one two-dimensional image is within 5 standard errors of the exact density
    mixture, schedule = three_modes(), VP()
    x = torch.tensor([0.1, 0.2], dtype=torch.float64).view(1, 1, 1, 2).expand(400, 1, 1, 2)
    log_p, _, _ = flow_log_density(MixtureDenoiser(mixture, schedule), x, noise=Normal())
    first = schedule(torch.tensor([schedule.t_min], dtype=torch.float64)).scalars()[0]
    exact = mixture.log_density(x[:1], first).item()
    assert log_p.std() > 0
    assert log_p.mean().item() == pytest.approx(exact, abs=5 * log_p.std().item() / 20 + 0.01)


def test_bits_of_the_flow_agree_with_the_exact_likelihood_of_a_discretised_mixture():
    # uniform dequantisation gives an upper bound (Jensen), which is tight if the density is smooth within a bin
    mixture = _pixels()
    x0, bits = _bytes_of(mixture, 4000)
    result = flow_likelihood(MixtureDenoiser(mixture, VP()), x0, noise=Normal())
    # the outer bytes also contain the mass beyond [-1, 1], which the density within the bin does not
    inner = x0.flatten().abs() < 0.99
    assert (result.bits - bits)[inner].mean().item() == pytest.approx(0, abs=0.003)


def test_bytes_are_dequantised_uniformly():
    # E[-ln p(x0 + u)] of a Gaussian narrower than a bin, u uniform in +- h: Var[u] adds to (x0 - mean)^2
    narrow, h, schedule = gaussian(0.2, 0.002), 1 / 255, VP()
    x0 = torch.full((400, 1, 1, 1), 153 / 127.5 - 1, dtype=torch.float64)
    bits = flow_likelihood(MixtureDenoiser(narrow, schedule), x0, noise=Normal()).bits
    first = schedule(torch.tensor([schedule.t_min], dtype=torch.float64)).scalars()[0]
    variance = (first.alpha * 0.002) ** 2 + first.sigma**2
    offset = x0[0].item() - first.alpha * 0.2
    nats = math.log(2 * math.pi * variance) / 2 + (offset**2 + h**2 / 3) / (2 * variance)
    expected = nats / math.log(2) - math.log2(2 * h)
    assert bits.mean().item() == pytest.approx(expected, abs=5 * bits.std().item() / 20)
    assert bits.std() > 0.1


def test_error_names_the_time_where_the_flow_is_not_finite():
    class Diverged(MixtureDenoiser):
        def forward(self, x_t, level, condition=None):
            return super().forward(x_t * (math.nan if level.sigma > 0.9 else 1.0), level)

    with pytest.raises(ValueError, match=r"^the flow is not finite .* from t = 0\.\d+ on:"):
        flow_log_density(Diverged(three_modes(), VP()), torch.zeros(1, 1, 1, 2).double(), noise=Normal())


def test_bound_accepts_a_clipped_denoiser():
    schedule = Linear(50)
    denoiser = MixtureDenoiser(gaussian(0.0, 2.0), schedule)
    x0 = _bytes((8, 1, 1, 1))
    _, clipped = _bound(StaticClipping(denoiser), Chain(schedule), x0, noise=Normal())
    assert clipped.isfinite().all()


@pytest.mark.parametrize(
    ("schedule", "times", "name"),
    [(VP(), None, "schedule"), (Linear(), [5, 3], "times"), (Cosine(1), None, "schedule.T=1")],
)
def test_invalid_chains_are_refused(schedule, times, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        Chain(schedule, times)


def test_dormand_prince_has_order_five():
    # y' = cos(x) y, y = exp(sin x): a tenth of the tolerance takes 10^(1/5) times as many steps
    def solve(tolerance):
        start = torch.ones(1, dtype=torch.float64)
        (y,), evaluations = integrate(lambda x, y: (math.cos(x) * y[0],), (start,), 0.0, 10.0, tolerance)
        return abs(y.item() - math.exp(math.sin(10))), evaluations

    rough, fine = solve(1e-4), solve(1e-9)
    assert fine[0] < 1e-7
    assert fine[1] / rough[1] == pytest.approx(1e5 ** (1 / 5), rel=0.5)


def test_integration_reports_a_tolerance_out_of_reach():
    start = (torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"^tolerance=1e-30 is not reached"):
        integrate(lambda x, y: (torch.rand(1), y[1]), start, 0.0, 1.0, 1e-30, max_evaluations=100)


@pytest.mark.parametrize("part", [0, 1])
def test_integration_reports_where_the_derivative_is_not_finite(part):
    def derivative(x, y):
        slopes = [torch.ones(1), torch.ones(1)]
        slopes[part] *= math.nan if x > 0.5 else 1
        return tuple(slopes)

    with pytest.raises(NotFinite) as caught:
        integrate(derivative, (torch.zeros(1), torch.zeros(1)), 0.0, 1.0, 1e-5)
    assert 0 < caught.value.x <= 0.5

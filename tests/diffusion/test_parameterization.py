"""Parameterisations: coefficients of the papers, the optimal network for known data, invariances."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch

from src.diffusion import parameterization as parameterizations
from src.diffusion import weighting as weightings
from src.diffusion.denoiser import Denoiser
from src.diffusion.forward import diffuse
from src.diffusion.loss import DenoisingLoss
from src.diffusion.noise_level import NoiseLevel
from src.diffusion.schedule import VE, VP, ContinuousCosine, RectifiedFlow
from src.diffusion.time_sampling import Uniform
from tests.diffusion.mixture import Mixture, gaussian, three_modes
from tests.diffusion.test_schedule import ALL

PARAMETERIZATIONS = {
    "eps": parameterizations.Eps(),
    "x0": parameterizations.X0(),
    "v": parameterizations.V(),
    "velocity": parameterizations.Velocity(),
    "score": parameterizations.Score(),
    "edm": parameterizations.EDM(0.5),
}
PURE_NOISE = {"jsd", "rectified_flow", "zero_terminal_snr"}
ALLOWED = [
    (s, p)
    for s, p in itertools.product(ALL, PARAMETERIZATIONS)
    if not (s in PURE_NOISE and p in ("eps", "score"))
]
REFUSED = [pair for pair in itertools.product(ALL, PARAMETERIZATIONS) if pair not in ALLOWED]


def _images(n, seed, shape=(1, 4, 4)):
    return torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _times(schedule, n):
    return schedule.time_at(torch.linspace(0.001, 0.999, n, dtype=torch.float64))


class Best(torch.nn.Module):
    """The network that makes a denoiser exact for a mixture: F = (E[x0 | x_t] - c_skip x_t) / c_out.

    It divides by c_in, so that a wrong c_in changes the result. `change`, a function of x_t, is added to the output.
    """

    def __init__(self, mixture, parameterization, level, change):
        super().__init__()
        self.mixture, self.level, self.change = mixture, level, change
        self.coefficients = parameterization.coefficients(level)

    def forward(self, x, label, condition=None):
        c_in, c_skip, c_out = (torch.as_tensor(c).view(-1, 1, 1, 1) for c in self.coefficients)
        x_t = x / c_in
        return (self.mixture.posterior_mean(x_t, self.level) - c_skip * x_t) / c_out + self.change(x_t)


@pytest.mark.parametrize(
    ("name", "level", "expected"),
    [  # in the conventions of the papers: DDPM eq. 11; Salimans & Ho app. D; Lipman eq. 23; Karras table 1
        ("eps", NoiseLevel(0.6, 0.8, 0.0), (1, 1 / 0.6, -0.8 / 0.6)),
        ("x0", NoiseLevel(0.6, 0.8, 0.0), (1, 0, 1)),
        ("v", NoiseLevel(0.6, 0.8, 0.0), (1, 0.6, -0.8)),
        ("velocity", NoiseLevel(0.3, 0.7, 0.0), (1, 1, -0.7)),
        ("score", NoiseLevel(0.6, 0.8, 0.0), (1, 1 / 0.6, 0.64 / 0.6)),
        ("edm", NoiseLevel(1.0, 2.0, 0.0), (1 / 4.25**0.5, 0.25 / 4.25, 2 * 0.5 / 4.25**0.5)),
    ],
)
def test_coefficients_equal_those_of_the_papers(name, level, expected):
    assert PARAMETERIZATIONS[name].coefficients(level) == pytest.approx(expected, rel=1e-14)


def test_label_of_edm():
    # c_noise = ln(sigma)/4, which depends only on the SNR
    edm = PARAMETERIZATIONS["edm"]
    assert edm.label(NoiseLevel(1.0, 2.0, 7.0)) == pytest.approx(0.25 * 0.6931471805599453, rel=1e-14)
    assert edm.label(NoiseLevel(0.5, 1.0, 7.0)) == pytest.approx(0.25 * 0.6931471805599453, rel=1e-14)
    assert edm.label(NoiseLevel(0.0, 1.0, 7.0)) == 5.0


@pytest.mark.parametrize(("schedule", "name"), ALLOWED)
def test_target_gives_the_exact_prediction(schedule, name):
    parameterization, schedule = PARAMETERIZATIONS[name], ALL[schedule]
    x0, eps = _images(7, 0), _images(7, 1)
    level = schedule(_times(schedule, 7))
    x_t = diffuse(x0, eps, level)
    prediction = parameterization.predict(x_t, parameterization.target(x0, eps, level), level)
    # the float64 error of alpha^2 + sigma^2 = 1 is amplified by up to 1/sigma or sigma/alpha
    torch.testing.assert_close(prediction.x0, x0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(prediction.eps, eps, rtol=1e-8, atol=1e-8)


def _noise_left(data, level):
    """E[Var[x0 | x_t]] of one-pixel images at one level, from Bayes' rule by quadrature over x_t in numpy.

    E[x0^2] - E[E[x0 | x_t]^2], where p(x_t) = sum_k w_k N(alpha m_k, alpha^2 v_k + sigma^2).
    """
    m, v, w = (a.flatten().numpy()[:, None] for a in (data.means, data.variances, data.weights))
    alpha, sigma = (float(a[0]) for a in (level.alpha, level.sigma))
    centre, spread = alpha * m, np.sqrt(alpha**2 * v + sigma**2)
    squares = 0.0
    for i in range(len(w)):  # integrate each component on a grid adapted to it
        x = centre[i] + spread[i] * np.linspace(-12, 12, 20_001)
        joint = w * scipy.stats.norm.pdf(x, centre, spread)
        mean = (joint * (m + alpha * v / spread**2 * (x - centre))).sum(axis=0) / joint.sum(axis=0)
        squares += np.trapezoid(joint[i] * mean**2, x)
    return (w * (m**2 + v)).sum() - squares


def _one_pixel_mixture():
    means, variances, weights = torch.tensor(
        [[0.7, -0.6, -0.1], [0.01, 0.04, 0.0025], [0.5, 0.3, 0.2]], dtype=torch.float64
    )
    return Mixture(means.view(3, 1, 1, 1), variances, weights)


DATA = {"gaussian": gaussian(0.3, 0.5), "mixture": _one_pixel_mixture()}


def test_the_quadrature():
    # one Gaussian: Var[x0 | x_t] = v sigma^2 / (alpha^2 v + sigma^2)
    level = NoiseLevel(torch.tensor([0.6]).double(), torch.tensor([0.8]).double(), torch.zeros(1))
    expected = 0.25 * 0.64 / (0.36 * 0.25 + 0.64)
    assert _noise_left(DATA["gaussian"], level) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("schedule", ALL)
def test_the_marginals_of_the_forward_process(schedule, data):
    # 20,000 noisy pixels against the CDF of p(x_t); a wrong alpha or sigma gives p = 0
    schedule, data = ALL[schedule], DATA[data]
    x0, _ = data.sample(20_000, torch.Generator().manual_seed(0))
    m, v, w = (a.flatten().numpy() for a in (data.means, data.variances, data.weights))
    for t in _times(schedule, 4):
        level = schedule(t.expand(20_000))
        alpha, sigma = level.alpha[0].item(), level.sigma[0].item()

        def cdf(x, alpha=alpha, sigma=sigma, inflated=1.0):
            spread = inflated * np.sqrt(alpha**2 * v + sigma**2)
            return (w * scipy.stats.norm.cdf(x[:, None], alpha * m, spread)).sum(axis=1)

        x_t = diffuse(x0, _images(20_000, 1, (1, 1, 1)), level).flatten().numpy()
        assert scipy.stats.kstest(x_t, cdf).pvalue > 1e-4
        assert scipy.stats.kstest(x_t, lambda x, cdf=cdf: cdf(x, inflated=1.25)).pvalue < 1e-4


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("schedule", "name"), ALLOWED)
def test_posterior_mean_minimises_the_loss(schedule, name, data):
    # The expected loss of the best F is E[Var[x0 | x_t]] / c_out^2. Any other F adds the mean square of its difference
    # from the best, up to a cross term: about 1/70 of the product of the RMS of the difference and of the error.
    parameterization, schedule, data = PARAMETERIZATIONS[name], ALL[schedule], DATA[data]
    n = 20_000
    x0, _ = data.sample(n, torch.Generator().manual_seed(0))
    eps = _images(n, 1, (1, 1, 1))
    for t in _times(schedule, 4):
        level = schedule(t.expand(n))
        c_out = torch.as_tensor(parameterization.coefficients(level)[2]).view(-1)[0].item()
        irreducible = _noise_left(data, level) / c_out**2

        def losses(change, level=level, t=t):
            denoiser = Denoiser(Best(data, parameterization, level, change), schedule, parameterization)
            return DenoisingLoss(denoiser, weightings.Simple(), Uniform())(x0, t.expand(n), eps)

        best = losses(lambda x_t: 0.0)
        assert best.mean().item() == pytest.approx(irreducible, abs=5 * best.std().item() / n**0.5)
        for change in (torch.ones_like, torch.sin, lambda x_t: x_t / x_t.std()):
            for size in (-0.2 * irreducible**0.5, 0.2 * irreducible**0.5):
                other = losses(lambda x_t, change=change, size=size: size * change(x_t))
                assert other.mean() > best.mean()


WEIGHTINGS = {
    "simple": weightings.Simple(),
    "snr": weightings.SNR(),
    "min_snr": weightings.MinSNR(),
    "p2": weightings.P2(),
    "edm": weightings.EDM(),
    "learned_uncertainty": weightings.LearnedUncertainty(weightings.EDM()).double(),
}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_every_weighting_has_the_same_optimum(name, weighting):
    # The gradient of the expected loss with respect to a shift of the output is 0 at the best output. For 20,000
    # images it must be within 5 standard errors of 0 there, and outside for an output shifted by 0.1.
    parameterization, schedule, data = PARAMETERIZATIONS[name], VP(), three_modes()
    n, t = 20_000, torch.tensor([0.3], dtype=torch.float64)
    level = schedule(t.expand(n))
    x0, _ = data.sample(n, torch.Generator().manual_seed(0))
    eps = _images(n, 1, x0.shape[1:])

    def slopes(offset):
        added = torch.full((n, 1, 1, 1), offset, dtype=torch.float64, requires_grad=True)
        network = Best(data, parameterization, level, lambda x_t: added)
        denoiser = Denoiser(network, schedule, parameterization)
        losses = DenoisingLoss(denoiser, WEIGHTINGS[weighting], Uniform())(x0, t.expand(n), eps)
        (each,) = torch.autograd.grad(losses.sum(), added)
        return each.flatten()

    at_best, away = slopes(0.0), slopes(0.1)
    error = at_best.std() / n**0.5
    assert at_best.mean().abs() < 5 * error
    assert away.mean() > 5 * error


@pytest.mark.parametrize(("schedule", "name"), REFUSED)
def test_parameterisations_undetermined_in_pure_noise_are_refused(schedule, name):
    with pytest.raises(ValueError, match=f"^parameterization={name} .*choose parameterization=v") as error:
        Denoiser(torch.nn.Identity(), ALL[schedule], PARAMETERIZATIONS[name])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_denoiser_predicts_the_same_in_every_parameterisation(dtype):
    schedule = VP()
    x_t = _images(9, 3).to(dtype)
    level = schedule(_times(schedule, 9)[2:])
    x_t = x_t[2:]
    x0 = torch.tanh(x_t)
    eps = (x_t.double() - level.alpha.view(-1, 1, 1, 1) * x0.double()) / level.sigma.view(-1, 1, 1, 1)
    predictions = {
        name: p.predict(x_t, p.target(x0.double(), eps, level).to(dtype), level)
        for name, p in PARAMETERIZATIONS.items()
    }
    # relative to the noisy image; x0 from eps amplifies the rounding of eps by sigma/alpha
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    gain = torch.maximum(level.sigma / level.alpha, torch.ones(())).view(-1, 1, 1, 1)
    loss = torch.maximum(level.alpha / level.sigma, torch.ones(())).view(-1, 1, 1, 1)
    for prediction in predictions.values():
        assert prediction.x0.dtype == dtype
        assert ((prediction.x0 - x0) / gain).abs().max() < tolerance
        assert ((prediction.eps - eps) / loss / eps.abs().clamp(min=1)).abs().max() < tolerance


class Wavy(torch.nn.Module):
    def forward(self, x, label, condition=None):
        return torch.sin(3 * x) + x.flip(-1)


# the score is excluded: its scale depends on that of x_t
@pytest.mark.parametrize("name", [name for name in PARAMETERIZATIONS if name != "score"])
def test_schedules_of_equal_snr_give_the_same_image(name):
    # this network ignores the label, so the prediction depends only on x_t/alpha
    vp, others = VP(), [VE(), ContinuousCosine(), RectifiedFlow(t_max=0.999)]
    parameterization = PARAMETERIZATIONS[name]
    t = torch.tensor([0.05, 0.2, 0.4], dtype=torch.float64)
    level = vp(t)
    unscaled = _images(3, 5)
    expected = Denoiser(Wavy(), vp, parameterization)(unscaled * level.alpha.view(-1, 1, 1, 1), level)
    for schedule in others:
        same = schedule(schedule.time_of_log_snr(level.log_snr))
        ours = Denoiser(Wavy(), schedule, parameterization)(unscaled * same.alpha.view(-1, 1, 1, 1), same)
        torch.testing.assert_close(ours.x0, expected.x0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours.eps, expected.eps, rtol=1e-9, atol=1e-9)


def test_invalid_sigma_data_is_refused():
    with pytest.raises(ValueError, match=r"^sigma_data must be positive"):
        parameterizations.EDM(0.0)

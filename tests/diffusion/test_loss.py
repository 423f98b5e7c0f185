"""The training losses against the papers' formulas, computed independently in numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from src.diffusion import loss as losses
from src.diffusion.denoiser import Denoiser
from src.diffusion.distance import Absolute, Huber, Squared
from src.diffusion.parameterization import X0, Eps, V
from src.diffusion.schedule import VP, Cosine, Linear
from src.diffusion.time_sampling import Importance, Uniform
from src.diffusion.variance import Large, Learned, LearnedRange, Small
from src.diffusion.weighting import EDM, P2, SNR, LearnedUncertainty, MinSNR, Simple
from tests.diffusion import reference_numpy as reference

T = 1000
TABLES = {
    "linear": (Linear(T), reference.alphabar_of(reference.betas_linear(T))),
    "cosine": (Cosine(T), reference.alphabar_of(reference.betas_cosine(T))),
    "cosine of 4,000 steps": (Cosine(4000), reference.alphabar_of(reference.betas_cosine(4000))),
}


def _times(alphabar):
    """The times 1, 2, T/2, T of a table with T + 1 entries."""
    last = len(alphabar) - 1
    return np.array([1, 2, last // 2, last])


class Wavy(nn.Module):
    """Depends on the image and on the label, so that a wrong time changes the output."""

    def forward(self, x, label, condition=None):
        return torch.sin(x + label.view(-1, 1, 1, 1) / 100)


class Doubled(nn.Module):
    """Predicts also the variance, in [-1, 1]. Each half of the output has one parameter."""

    def __init__(self):
        super().__init__()
        self.mean, self.variance = (nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in range(2))

    def forward(self, x, label, condition=None):
        return torch.cat([self.mean * Wavy()(x, label), self.variance * torch.cos(2 * x)], dim=1)


def _draws(shape=(4, 3, 4, 4), seed=0):
    """Images of byte values, including -1 and 1, and noise."""
    rng = np.random.default_rng(seed)
    x0 = rng.integers(0, 256, shape) / 127.5 - 1
    x0[:, 0, 0, :2] = -1, 1
    return x0, rng.standard_normal(shape)


def _diffused(alphabar, x0, eps):
    table = alphabar[_times(alphabar)].reshape(-1, 1, 1, 1)
    return np.sqrt(table) * x0 + np.sqrt(1 - table) * eps, table


def _output(x_t, alphabar):
    """`Wavy` in numpy."""
    return np.sin(x_t + (_times(alphabar).reshape(-1, 1, 1, 1) - 1) / 100)


def _call(loss, x0, eps):
    times = torch.from_numpy(_times(loss.denoiser.schedule.alphabar)).double()
    return loss(torch.from_numpy(x0), times, torch.from_numpy(eps))


@pytest.mark.parametrize("name", TABLES)
def test_l_simple_of_ddpm(name):
    # Ho et al. 2020, eq. 14, at t = 1, 2, T/2, T: mean over pixels of (eps - F(x_t, t - 1))^2
    schedule, alphabar = TABLES[name]
    x0, eps = _draws()
    loss = losses.DenoisingLoss(Denoiser(Wavy(), schedule, Eps()), Simple(), Uniform())
    ours = _call(loss, x0, eps)
    assert ours.dtype == torch.float64
    x_t, _ = _diffused(alphabar, x0, eps)
    np.testing.assert_allclose(ours, ((eps - _output(x_t, alphabar)) ** 2).mean(axis=(1, 2, 3)), rtol=1e-10)


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        (Squared(), lambda d: d**2),
        (Absolute(), np.abs),
        (Huber(0.5), lambda d: np.where(np.abs(d) < 0.5, d**2 / 2, 0.5 * (np.abs(d) - 0.25))),
    ],
)
def test_distances(distance, expected):
    schedule, alphabar = TABLES["linear"]
    x0, eps = _draws()
    loss = losses.DenoisingLoss(Denoiser(Wavy(), schedule, Eps()), Simple(), Uniform(), distance)
    x_t, _ = _diffused(alphabar, x0, eps)
    np.testing.assert_allclose(
        _call(loss, x0, eps), expected(_output(x_t, alphabar) - eps).mean(axis=(1, 2, 3)), rtol=1e-10
    )


def test_weights_on_x0_are_converted_to_weights_on_the_output():
    # min-SNR of Hang et al. 2023 in its three published forms: the weight of the squared error is min(SNR, 5) for
    # x0, min(SNR, 5)/SNR for eps and min(SNR, 5)/(SNR + 1) for v
    schedule, alphabar = TABLES["linear"]
    x0, eps = _draws()
    x_t, table = _diffused(alphabar, x0, eps)
    snr = table / (1 - table)
    forms = {
        X0: (np.minimum(snr, 5), x0),
        Eps: (np.minimum(snr, 5) / snr, eps),
        V: (np.minimum(snr, 5) / (snr + 1), np.sqrt(table) * eps - np.sqrt(1 - table) * x0),
    }
    for parameterization, (weight, target) in forms.items():
        denoiser = Denoiser(Wavy(), schedule, parameterization())
        ours = _call(losses.DenoisingLoss(denoiser, MinSNR(), Uniform()), x0, eps)
        expected = (weight * (_output(x_t, alphabar) - target) ** 2).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(ours, expected, rtol=1e-9)


VARIANCES = {"small": Small(), "large": Large(), "learned_range": LearnedRange()}


def _bound_bits(alphabar, x0, eps, kind):
    """Terms of the bound for `Doubled` (`Wavy` for a fixed variance) with eps-prediction, shape (4,)."""
    x_t, table = _diffused(alphabar, x0, eps)
    x0_hat = (x_t - np.sqrt(1 - table) * _output(x_t, alphabar)) / np.sqrt(table)
    v = np.cos(2 * x_t)
    chain = list(range(1, len(alphabar)))
    return np.concatenate(
        [
            reference.bound_bits(
                alphabar, chain, t - 1, *(a[i : i + 1] for a in (x0, x_t, x0_hat)), kind, v[i]
            )
            for i, t in enumerate(_times(alphabar))
        ]
    )


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name", TABLES)
def test_l_vlb_of_improved_ddpm(name, variance):
    # RESCALED_KL in their code: T times the KL term (the decoder term at t = 1) in bits per dimension
    schedule, alphabar = TABLES[name]
    x0, eps = _draws()
    network = Doubled() if variance == "learned_range" else Wavy()
    loss = losses.VariationalLoss(Denoiser(network, schedule, Eps(), VARIANCES[variance]), Uniform())
    expected = (len(alphabar) - 1) * _bound_bits(alphabar, x0, eps, variance)
    np.testing.assert_allclose(_call(loss, x0, eps).detach(), expected, rtol=1e-10)


@pytest.mark.parametrize("name", TABLES)
def test_l_hybrid_of_improved_ddpm(name):
    # eq. 16 and RESCALED_MSE: L_simple + 0.001 T L_vlb
    schedule, alphabar = TABLES[name]
    x0, eps = _draws()
    loss = losses.HybridLoss(Denoiser(Doubled(), schedule, Eps(), LearnedRange()), Simple(), Uniform())
    x_t, _ = _diffused(alphabar, x0, eps)
    simple = ((eps - _output(x_t, alphabar)) ** 2).mean(axis=(1, 2, 3))
    expected = simple + 0.001 * (len(alphabar) - 1) * _bound_bits(alphabar, x0, eps, "learned_range")
    np.testing.assert_allclose(_call(loss, x0, eps).detach(), expected, rtol=1e-10)


def test_bound_of_the_hybrid_loss_trains_only_the_variance():
    schedule, _ = TABLES["linear"]
    x0, eps = _draws()

    def gradients(loss):
        network = loss.denoiser.network
        return torch.autograd.grad(_call(loss, x0, eps).sum(), (network.mean, network.variance))

    denoiser = Denoiser(Doubled(), schedule, Eps(), LearnedRange())
    hybrid = gradients(losses.HybridLoss(denoiser, Simple(), Uniform(), vlb_weight=0.5))
    vlb = gradients(losses.VariationalLoss(denoiser, Uniform()))
    fixed = Denoiser(Wavy(), schedule, Eps())
    fixed.network = nn.Module()
    fixed.network.mean = denoiser.network.mean
    fixed.network.forward = lambda x, label, condition=None: denoiser.network.mean * Wavy()(x, label)
    simple = torch.autograd.grad(
        _call(losses.DenoisingLoss(fixed, Simple(), Uniform()), x0, eps).sum(), denoiser.network.mean
    )
    torch.testing.assert_close(hybrid[0], simple[0])
    torch.testing.assert_close(hybrid[1], 0.5 * vlb[1])


def test_learned_log_variance_in_the_bound():
    schedule, alphabar = TABLES["linear"]
    x0, eps = _draws()
    loss = losses.VariationalLoss(Denoiser(Doubled(), schedule, Eps(), Learned()), Uniform())
    expected = T * _bound_bits(alphabar, x0, eps, "learned")
    np.testing.assert_allclose(_call(loss, x0, eps).detach(), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d, f: losses.DenoisingLoss(d, Simple(), Uniform()), "denoiser has a learned variance"),
        (lambda d, f: losses.HybridLoss(f, Simple(), Uniform()), "denoiser has a fixed variance"),
        (
            lambda d, f: losses.DenoisingLoss(f, LearnedUncertainty(EDM()), Importance()),
            "time_sampling=importance prefers",
        ),
        (
            lambda d, f: losses.HybridLoss(d, LearnedUncertainty(EDM()), Importance()),
            "time_sampling=importance prefers",
        ),
        (lambda d, f: losses.HybridLoss(d, Simple(), Uniform(), vlb_weight=0), "vlb_weight must be positive"),
        (
            lambda d, f: losses.VariationalLoss(Denoiser(Wavy(), VP(), Eps()), Uniform()),
            "schedule must be discrete",
        ),
    ],
)
def test_incompatible_parts_are_refused(make, message):
    learned = Denoiser(Doubled(), Linear(), Eps(), LearnedRange())
    with pytest.raises(ValueError, match=f"^{message}"):
        make(learned, Denoiser(Wavy(), Linear(), Eps()))


@pytest.mark.parametrize("weighting", [Simple(), SNR(), MinSNR(), P2(), EDM(), LearnedUncertainty(EDM())])
@pytest.mark.parametrize("parameterization", [Eps(), X0(), V()])
def test_training_step_does_not_synchronise(parameterization, weighting):
    # meta tensors have no values: reading one raises here and would synchronise on a GPU
    loss = losses.DenoisingLoss(Denoiser(Wavy(), Linear(), parameterization), weighting, Uniform()).to("meta")
    x0, eps = torch.empty(2, 4, 3, 4, 4, device="meta").unbind()
    assert loss(x0, torch.tensor([1, 2, T // 2, T]).double(), eps).is_meta


@pytest.mark.parametrize(
    "make",
    [lambda d: losses.HybridLoss(d, Simple(), Uniform()), lambda d: losses.VariationalLoss(d, Uniform())],
)
def test_bound_does_not_synchronise(make):
    loss = make(Denoiser(Doubled(), Linear(), Eps(), LearnedRange())).to("meta")
    x0, eps = torch.empty(2, 4, 3, 4, 4, device="meta").unbind()
    assert loss(x0, torch.tensor([1, 2, T // 2, T]).double(), eps).is_meta


def test_invalid_delta_is_refused():
    with pytest.raises(ValueError, match=r"^delta must be positive"):
        Huber(0.0)


def test_contrastive_flow_matching():
    """The error of the target minus a share of the error of the previous image's target, at the same time."""
    schedule, alphabar = TABLES["linear"]
    x0, eps = _draws()
    loss = losses.ContrastiveLoss(Denoiser(Wavy(), schedule, V()), Simple(), Uniform(), share=0.2)
    x_t, table = _diffused(alphabar, x0, eps)

    def error(x0, eps):
        target = np.sqrt(table) * eps - np.sqrt(1 - table) * x0
        return ((_output(x_t, alphabar) - target) ** 2).mean(axis=(1, 2, 3))

    other = error(np.roll(x0, 1, axis=0), np.roll(eps, 1, axis=0))
    np.testing.assert_allclose(_call(loss, x0, eps), error(x0, eps) - 0.2 * other, rtol=1e-9)
    np.testing.assert_allclose(_call(loss.eval(), x0, eps), error(x0, eps), rtol=1e-9)

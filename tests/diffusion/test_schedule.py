"""Checks schedules against independent tables, and their inverses."""

import math

import numpy as np
import pytest
import torch

from src.diffusion import schedule as schedules
from tests.diffusion import reference_numpy as reference

DISCRETE = {
    "linear": (schedules.Linear, lambda T: reference.alphabar_of(reference.betas_linear(T))),
    "scaled_linear": (
        schedules.ScaledLinear,
        lambda T: reference.alphabar_of(reference.betas_scaled_linear(T)),
    ),
    "quadratic": (
        schedules.Quadratic,
        lambda T: reference.alphabar_of(reference.betas_scaled_linear(T, 1e-4, 0.02)),
    ),
    "cosine": (schedules.Cosine, lambda T: reference.alphabar_of(reference.betas_cosine(T))),
    "sigmoid": (schedules.Sigmoid, reference.alphabar_sigmoid),
    "sigmoid_beta": (schedules.SigmoidBeta, lambda T: reference.alphabar_of(reference.betas_sigmoid(T))),
    "constant": (schedules.Constant, lambda T: reference.alphabar_of([0.02] * T)),
    "jsd": (schedules.JSD, lambda T: reference.alphabar_of(reference.betas_jsd(T))),
    "zero_terminal_snr": (
        lambda T: schedules.ZeroTerminalSNR(schedules.Cosine(T)),
        lambda T: reference.alphabar_zero_terminal(reference.alphabar_of(reference.betas_cosine(T))),
    ),
}
# name -> the schedule, alpha(t), sigma(t) from the papers
CONTINUOUS = {
    "vp": (
        schedules.VP(),
        lambda t: math.exp(-0.25 * t**2 * 19.9 - 0.05 * t),
        lambda t: math.sqrt(1 - math.exp(-0.5 * t**2 * 19.9 - 0.1 * t)),
    ),
    "ve": (schedules.VE(), lambda t: 1.0, lambda t: 0.01 * 5000**t),
    "edm": (schedules.EDM(), lambda t: 1.0, lambda t: t),
    "cosine_continuous": (
        schedules.ContinuousCosine(image_size=64),
        lambda t: math.cos(math.pi * t / 2),
        lambda t: math.sin(math.pi * t / 2),
    ),
    "rectified_flow": (schedules.RectifiedFlow(), lambda t: 1 - t, lambda t: t),
}
# all schedules; discrete ones with a short table
ALL = {name: make(T=200) for name, (make, _) in DISCRETE.items()} | {
    name: entry[0] for name, entry in CONTINUOUS.items()
}


@pytest.mark.parametrize("T", [100, 1000, 4000])
@pytest.mark.parametrize("name", DISCRETE)
def test_tables_equal_the_papers_formulas(name, T):
    make, alphabar = DISCRETE[name]
    schedule, expected = make(T=T), alphabar(T)
    rows = [0, 1, 2, T // 2, T]
    level = schedule(torch.tensor(rows, dtype=torch.float64))
    np.testing.assert_allclose(schedule.alphabar, expected, rtol=1e-10)
    np.testing.assert_allclose(level.alpha, np.sqrt(expected[rows]), rtol=1e-10)
    np.testing.assert_allclose(level.sigma[1:], np.sqrt(1 - expected[rows[1:]]), rtol=1e-10)
    assert level.alpha[0] == 1
    assert level.sigma[0] == 0
    assert level.label.tolist() == [row - 1 for row in rows]


def test_published_values():
    # alphabar_T of the published settings (computed from the papers' formulas by several implementations):
    # DDPM 4.0358e-05, Stable Diffusion 4.6602e-03, improved DDPM's cosine 2.4288e-09
    assert schedules.Linear().alphabar[-1].item() == pytest.approx(4.0358e-05, rel=1e-4)
    assert schedules.ScaledLinear().alphabar[-1].item() == pytest.approx(4.6602e-03, rel=1e-4)
    assert schedules.Cosine().alphabar[-1].item() == pytest.approx(2.4288e-09, rel=1e-3)


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_schedules_invert_their_log_snr(name):
    schedule = DISCRETE[name][0](T=200)
    pure_noise = schedule.alphabar[-1] == 0
    # in that case the log-SNR of the last time is -infinity
    t = torch.linspace(1, 199 if pure_noise else 200, 777, dtype=torch.float64)
    torch.testing.assert_close(schedule.time_of_log_snr(schedule(t).log_snr), t, rtol=1e-7, atol=1e-7)
    assert schedule.nearest_time([math.inf, -math.inf]).tolist() == [1, 200]
    first, last = schedule.log_snr[1].item(), schedule.log_snr[-1].item()
    for outside in [first + 0.01] if pure_noise else [first + 0.01, last - 0.01]:
        with pytest.raises(ValueError, match=r"^log_snr must be in \[.*\], the range of .*'s table, got"):
            schedule.time_of_log_snr([first, outside])
    if pure_noise:
        assert schedule.time_of_log_snr([-30.0, -math.inf]).tolist() == [200, 200]


def test_uniform_times_of_a_table():
    schedule = schedules.Cosine(T=4)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.9999], dtype=torch.float64)
    assert schedule.time_at(u).tolist() == [1, 1, 2, 4]


@pytest.mark.parametrize("t", [-1.0, 0.5, 1001.0])
def test_times_outside_the_table_are_refused(t):
    with pytest.raises(ValueError, match=r"times must be 0 \(clean\) or in \[1, 1000\]"):
        schedules.Linear()(torch.tensor([t]))


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match="beta_end"):
        schedules.Linear(T=10)
    with pytest.raises(ValueError, match="T must be at least 1"):
        schedules.Cosine(T=-1)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_schedules_equal_the_papers_formulas(name):
    schedule, alpha, sigma = CONTINUOUS[name]
    times = [schedule.t_min, 0.01, 0.3, 0.7, schedule.t_max]
    level = schedule(torch.tensor(times, dtype=torch.float64))
    np.testing.assert_allclose(level.alpha, [alpha(t) for t in times], rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(level.sigma, [sigma(t) for t in times], rtol=1e-9)
    clean = schedule(torch.zeros(1, dtype=torch.float64))
    assert clean.alpha.item() == 1
    assert clean.sigma.item() == 0


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_schedules_invert_their_log_snr_and_their_quantiles(name):
    schedule, _, _ = CONTINUOUS[name]
    u = torch.linspace(0, 0.999, 1001, dtype=torch.float64)
    t = schedule.time_at(u)
    assert t.min().item() == pytest.approx(schedule.t_min)
    assert t.max().item() < schedule.t_max
    torch.testing.assert_close(schedule.quantile(t), u, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.time_of_log_snr(schedule(t).log_snr), t, rtol=1e-7, atol=1e-9)
    extremes = [math.inf, -math.inf]
    assert schedule.nearest_time(extremes).tolist() == [schedule.t_min, schedule.t_max]
    assert schedule.nearest_time(extremes, lowest=0.5 * schedule.t_min).tolist() == [
        0.5 * schedule.t_min,
        schedule.t_max,
    ]
    assert schedule.nearest_time(extremes, lowest=0.5).tolist() == [schedule.t_min, schedule.t_max]


@pytest.mark.parametrize("name", CONTINUOUS)
def test_log_snr_below_the_smallest_time_is_inverted_exactly(name):
    schedule, _, _ = CONTINUOUS[name]
    t = schedule.t_min * torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    torch.testing.assert_close(schedule.time_of_log_snr(schedule(t).log_snr), t, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_times_may_have_any_shape(name):
    schedule = ALL[name]
    t = schedule.time_at(torch.linspace(0.1, 0.9, 6, dtype=torch.float64)).view(3, 2)
    t[0, 0] = 0.0
    level, flat = schedule(t), schedule(t.flatten().tolist())
    for field in ("alpha", "sigma", "label", "log_snr", "snr"):
        assert getattr(level, field).shape == (3, 2)
        assert torch.equal(getattr(level, field).flatten(), getattr(flat, field))


@pytest.mark.parametrize("name", ALL)
def test_noise_grows_with_time(name):
    schedule = ALL[name]
    log_snr = schedule(schedule.time_at(torch.linspace(0, 0.9999, 50, dtype=torch.float64))).log_snr
    assert (log_snr.diff() < 0).all()


def test_labels():
    # 999 t for the VP networks of score SDE, ln(sigma)/4 for EDM
    t = torch.tensor([0.5], dtype=torch.float64)
    assert schedules.VP()(t).label.item() == 499.5
    assert schedules.EDM()(t).label.item() == pytest.approx(math.log(0.5) / 4, rel=1e-14)


def test_cosine_is_shifted_with_the_resolution():
    # simple diffusion, eq. 4: the log-SNR (of the variances) is shifted by 2 ln(64/d)
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    small, large = schedules.ContinuousCosine(image_size=64)(t), schedules.ContinuousCosine(image_size=256)(t)
    np.testing.assert_allclose(large.log_snr - small.log_snr, -math.log(4), rtol=1e-12)
    # the geometric mean of 128 and 32 is 64
    wide = schedules.ContinuousCosine(image_size=[128, 32])(t)
    np.testing.assert_allclose(wide.log_snr, small.log_snr, rtol=1e-12)
    square = schedules.ContinuousCosine(image_size=[256, 256])(t)
    assert torch.equal(square.log_snr, large.log_snr)


def test_rescaling_keeps_the_first_row_and_ends_at_pure_noise():
    inner = schedules.ScaledLinear()
    schedule = schedules.ZeroTerminalSNR(inner)
    assert schedule.alphabar[1].item() == pytest.approx(inner.alphabar[1].item(), rel=1e-14)
    assert schedule.alphabar[-1] == 0


def test_times_between_rows_map_to_the_nearest_row():
    schedule = schedules.Linear(T=100)
    t = torch.tensor([1.0, 1.4, 1.6, 99.5, 100.0], dtype=torch.float64)
    assert schedule.time_at(schedule.quantile(t)).tolist() == [1, 1, 2, 100, 100]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: schedules.VP(beta_min=20), "beta_min"),
        (lambda: schedules.VP(t_min=0), "t_min"),
        (lambda: schedules.RectifiedFlow(t_max=1.5), "t_max"),
        (lambda: schedules.ContinuousCosine(t_max=1.0), "t_max"),
        (lambda: schedules.ContinuousCosine(image_size=0), "image_size"),
        (lambda: schedules.ContinuousCosine(image_size=[32, 0]), "image_size"),
        (lambda: schedules.EDM(sigma_min=100.0), "sigma_min"),
        (lambda: schedules.VE(sigma_min=0.0), "sigma_min"),
        (lambda: schedules.ZeroTerminalSNR(schedules.Linear(T=1, beta_end=1e-4)), "inner"),
    ],
)
def test_invalid_arguments_of_continuous_schedules_are_refused(make, name):
    with pytest.raises(ValueError, match=f"^{name} "):
        make()

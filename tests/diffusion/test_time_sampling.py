"""Checks time samplings against their distributions."""

import math

import numpy as np
import pytest
import torch

from src.diffusion.schedule import EDM, VP, Cosine, RectifiedFlow
from src.diffusion.time_sampling import Importance, LogitNormal, LogNormal, Stratified, Uniform
from tests.diffusion.test_schedule import ALL

SAMPLINGS = {
    "uniform": Uniform(),
    "stratified": Stratified(),
    "log_normal": LogNormal(),
    "logit_normal": LogitNormal(),
    "importance": Importance(bins=20),
}


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("schedule", ALL)
def test_times_lie_in_the_schedule_and_are_whole_for_tables(sampling, schedule):
    schedule = ALL[schedule]
    t = SAMPLINGS[sampling](500, schedule, _generator())
    assert t.dtype == torch.float64
    assert t.shape == (500,)
    assert t.min() >= schedule.t_min
    assert t.max() <= schedule.t_max
    if hasattr(schedule, "T"):
        assert torch.equal(t, t.round())
    assert torch.equal(t, SAMPLINGS[sampling](500, schedule, _generator()))


def test_uniform_over_a_table():
    counts = torch.bincount(Uniform()(40_000, Cosine(T=4), _generator()).long(), minlength=5)
    assert counts[0] == 0
    # 5 standard deviations of a binomial count
    assert (counts[1:] - 10_000).abs().max() < 5 * math.sqrt(40_000 * 0.25 * 0.75)


def test_stratified_has_one_draw_in_each_bin_in_random_order():
    t = Stratified()(100, VP(t_min=1e-9), _generator())
    bins = (t * 100).long()
    assert sorted(bins.tolist()) == list(range(100))
    assert not torch.equal(bins, bins.sort().values)
    again = Stratified()(100, VP(t_min=1e-9), _generator(1))
    assert not torch.equal((again * 100).long(), bins)


def test_log_normal_applies_to_sigma():
    log_sigma = LogNormal(-1.2, 1.2)(40_000, EDM(), _generator()).log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=5 * 1.2 / 200)
    assert log_sigma.std().item() == pytest.approx(1.2, rel=5 / math.sqrt(80_000))


def test_logit_normal_applies_to_the_time():
    t = LogitNormal(0.5, 1.5)(40_000, RectifiedFlow(t_min=1e-6), _generator())
    logit = (t / (1 - t)).log()
    # t_min shifts the smallest times by 1e-6 only
    assert logit.mean().item() == pytest.approx(0.5, abs=5 * 1.5 / 200)
    assert logit.std().item() == pytest.approx(1.5, rel=5 / math.sqrt(80_000))


def _filled(losses, history=10, uniform=0.001):
    """An importance sampling of a table after updates with losses of shape (T, updates)."""
    T = len(losses)
    sampling, schedule = Importance(bins=T, history=history, uniform=uniform), Cosine(T=T)
    for column in losses.T:
        sampling.update(torch.arange(1, T + 1).double(), torch.from_numpy(column), schedule)
    return sampling, schedule


def test_importance_uses_the_second_moment_of_the_last_losses():
    # Nichol & Dhariwal 2021, eq. 18: p_t ~ sqrt(E[L_t^2]) over the last 10, mixed with 0.001 uniform
    losses = np.random.default_rng(0).exponential(size=(6, 13)) * np.arange(1, 7)[:, None]
    sampling, schedule = _filled(losses)
    p = np.sqrt((losses[:, -10:] ** 2).mean(axis=1))
    p = p / p.sum() * 0.999 + 0.001 / 6
    np.testing.assert_allclose(sampling.probabilities(), p, rtol=1e-12)
    t = torch.arange(1, 7).double()
    np.testing.assert_allclose(sampling.weights(t, schedule), 1 / (6 * p), rtol=1e-12)
    n = 60_000
    counts = torch.bincount(sampling(n, schedule, _generator()).long(), minlength=7)[1:].numpy()
    assert (np.abs(counts - n * p) < 5 * np.sqrt(n * p)).all()


def test_importance_does_not_change_the_expected_loss():
    losses = np.linspace(1, 20, 6)[:, None] * np.ones(10)
    sampling, schedule = _filled(losses)
    t = sampling(50_000, schedule, _generator())
    loss = torch.from_numpy(losses[:, 0])[t.long() - 1]
    # if the loss is constant at each time, the weighted loss has almost no variance
    weighted = loss * sampling.weights(t, schedule)
    assert weighted.mean().item() == pytest.approx(losses[:, 0].mean(), rel=1e-3)
    assert weighted.std() < 0.05 * loss.std()


def test_importance_is_uniform_until_every_time_has_enough_losses():
    losses = np.random.default_rng(0).exponential(size=(6, 10))
    sampling, _ = _filled(losses[:, :9])
    assert torch.equal(sampling.probabilities(), torch.full((6,), 1 / 6, dtype=torch.float64))


def test_importance_state_is_restored():
    sampling, _ = _filled(np.random.default_rng(0).exponential(size=(6, 12)))
    other = Importance(bins=6)
    other.load_state_dict(sampling.state_dict())
    assert torch.equal(other.probabilities(), sampling.probabilities())
    assert isinstance(sampling.expected(), Uniform)


def test_importance_of_a_continuous_schedule():
    sampling, schedule = Importance(bins=5, history=1), VP()
    t = schedule.time_at(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64))
    sampling.update(t, torch.tensor([1.0, 1.0, 1.0, 1.0, 16.0]), schedule)
    assert sampling.probabilities()[4].item() == pytest.approx(0.8 * 0.999 + 0.0002)
    drawn = sampling(10_000, schedule, _generator())
    assert (drawn > schedule.time_at(torch.tensor(0.8))).double().mean().item() == pytest.approx(
        0.8, abs=0.02
    )


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: LogNormal(std=0.0), "std"),
        (lambda: LogitNormal(std=-1.0), "std"),
        (lambda: Importance(bins=0), "bins"),
        (lambda: Importance(history=0), "history"),
        (lambda: Importance(uniform=0.0), "uniform"),
    ],
)
def test_invalid_arguments_are_refused(make, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        make()

"""Intervals against repeated draws whose spread is known, and the digits that are printed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from src.evaluation.record import printed
from src.metrics.fidelity import FrechetDistance, InceptionScore, KernelDistance, PrecisionRecall
from src.metrics.frechet import Moments, Target, compare
from src.metrics.infinity import FrechetInfinity
from src.metrics.neighbours import DensityCoverage
from src.metrics.uncertainty import by_groups, by_influences, groups_of, of_share
from tests.metrics.pixels import PixelFeatures, reference_of

SIZE = 8


def draw(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Images (count, 1, 2, 4) of correlated Gaussian pixels."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(99))
    x = torch.randn(count, SIZE, generator=generator) @ mixing * 8 + 128 + shift
    return x.round().clamp(0, 255).byte().reshape(count, 1, 2, 4)


REFERENCE = draw(1500, seed=1)


def prepared(kind, **settings):
    features = PixelFeatures(SIZE, scale=0.05)
    if kind is InceptionScore:
        features.name = "inception_logits_unbiased"
    score = kind(features, **settings)
    score.with_intervals = True
    if score.needs_reference:
        score.of_reference = True
        score.update(REFERENCE)
        states = score.states("the reference")
        score.set_reference(reference_of(REFERENCE), {name: states[name] for name in score.reference_names})
        score.of_reference = False
    score.reset()
    return score


@pytest.mark.parametrize(
    ("kind", "settings", "n"),
    [
        (FrechetDistance, {}, 300),
        (KernelDistance, {"subset_size": 100, "subsets": 20}, 300),
        (InceptionScore, {"splits": 2}, 300),
        (PrecisionRecall, {}, 200),
        (DensityCoverage, {}, 200),
        (FrechetInfinity, {"points": 5, "smallest_share": 0.2}, 400),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_half_widths_are_those_of_repeated_draws(kind, settings, n):
    score = prepared(kind, **settings)
    values: dict[str, list[float]] = {}
    halves: dict[str, list[float]] = {}
    for seed in range(25):
        score.reset()
        score.update(draw(n, seed=100 + seed, shift=6.0))
        found = score.compute()
        for name, (low, high) in score.intervals.items():
            assert low < found[name] < high or found[name] in (low, high)
            values.setdefault(name, []).append(found[name])
            halves.setdefault(name, []).append((high - low) / 2)
    assert values
    for name, each in values.items():
        true = 1.96 * torch.tensor(each).std().item()
        # 25 draws know the true spread to 14 %; few images make an interval somewhat too wide
        assert 0.65 * true < sum(halves[name]) / len(halves[name]) < 1.8 * true, name


def test_influences_are_those_of_single_images():
    """Against the distance without one image at a time: the exact jackknife."""
    features = draw(200, seed=3, shift=5).flatten(1).double()
    target = Target.of(
        Moments(REFERENCE.flatten(1).double().mean(0), torch.cov(REFERENCE.flatten(1).double().T))
    )
    whole = compare(Moments(features.mean(0), torch.cov(features.T)), target, directions=True)
    effects = whole.influences(features)
    assert abs(effects.mean().item()) < 0.01 * effects.std().item()
    exact = []
    for i in range(30):
        rest = features[torch.arange(200) != i]
        without = compare(Moments(rest.mean(0), torch.cov(rest.T)), target).distance
        exact.append(199 * (whole.distance - without))
    both = torch.stack([torch.tensor(exact, dtype=torch.float64), effects[:30]])
    assert torch.corrcoef(both)[0, 1] > 0.99
    # equal up to a constant, the change of the bias, and to terms of second order
    assert (both[0].std() / both[1].std()).item() == pytest.approx(1, abs=0.1)


def test_a_share_has_wilsons_interval():
    # Wilson 1927; statsmodels.stats.proportion.proportion_confint(8, 10, method="wilson")
    assert of_share(0.8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert of_share(1.0, 100)[0] == pytest.approx(0.963, abs=1e-3)
    assert of_share(0.0, 100) == pytest.approx((0, 0.0370), abs=1e-4)


def test_jackknife_of_a_mean_is_its_standard_error():
    values = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = groups_of(2000)
    assert groups.bincount().tolist() == [100] * 20
    low, high = by_groups(values.mean().item(), [values[groups != g].mean().item() for g in range(20)], 2000)
    exact = by_influences(values.mean().item(), values)
    assert high - low == pytest.approx(exact[1] - exact[0], rel=0.35)


def test_an_interval_by_groups_is_one_of_a_share():
    assert by_groups(1.0, [1.0] * 20, 50) == of_share(1.0, 50)
    low, high = by_groups(0.98, [0.98, 0.9] * 10, 50)
    assert 0 < low < 0.98 < high == 1


def test_effects_on_a_kernel_distance_need_little_memory(monkeypatch):
    score = prepared(KernelDistance, subset_size=100, subsets=2)
    score.update(draw(300, seed=3))
    generated, reference = score.states("the generated set"), score.reference_states
    whole = score.influences(generated, reference)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            largest = max(largest, found.numel() if isinstance(found, torch.Tensor) else 0)
            return found

    monkeypatch.setattr("src.metrics.fidelity.KERNEL_ROWS", 10)
    with Sizes():
        found = score.influences(generated, reference)
    torch.testing.assert_close(found, whole)
    assert largest <= 10 * len(REFERENCE)


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [
        (0.5234, 0.031, "0.52 ± 0.03"),
        (0.5234, 0.012, "0.523 ± 0.012"),
        (3.14159, 0.5, "3.1 ± 0.5"),
        (1234.5, 60, "1230 ± 60"),
        (0.00012, 0.00003, "0.00012 ± 0.00003"),
        (-0.02, 0.3, "-0.0 ± 0.3"),
        (0.5, 0.0, "0.5"),
    ],
)
def test_as_many_digits_are_printed_as_the_interval_allows(value, half, text):
    assert printed(value, (value - half, value + half)) == text
    assert printed(value, None) == f"{value:.5g}"

"""Checks averages of weights against their definitions in numpy."""

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from src.errors import UserError
from src.training import post_hoc
from src.training.checkpoint import Checkpoints
from src.training.ema import EMA, HalfLifeEMA, PowerEMA


def _run(ema, path, folder=None, accumulate=1, start=0):
    """Moves a one-parameter network along a path of weights and calls the hooks of the callback."""
    network = nn.Linear(1, 1, bias=False).double()
    module = SimpleNamespace(denoiser=SimpleNamespace(network=network), gradient_norm=torch.zeros(()))
    trainer = SimpleNamespace(
        global_step=start, default_root_dir=str(folder), max_steps=len(path) - 1, is_global_zero=True
    )
    nn.init.constant_(network.weight, path[start])
    ema.on_train_start(trainer, module)
    for step in range(start + 1, len(path)):
        for micro in range(accumulate):
            if micro == accumulate - 1:
                nn.init.constant_(network.weight, path[step])
                trainer.global_step = step
            ema.on_train_batch_end(trainer, module, None, None, 0)
    return network


def _path(steps, seed=0):
    return np.cumsum(np.random.default_rng(seed).standard_normal(steps + 1)) / 10


def _averages(ema):
    return [average["weight"].item() for average in ema.averages]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("warmup", [False, True])
def test_constant_decay(warmup, accumulate):
    path = _path(200)
    ema = EMA(0.97, warmup)
    _run(ema, path, accumulate=accumulate)
    expected = path[0]
    for n, weight in enumerate(path[1:]):
        decay = min(0.97, (1 + n) / (10 + n)) if warmup else 0.97
        expected = decay * expected + (1 - decay) * weight
    assert _averages(ema) == pytest.approx([expected], rel=1e-12)
    assert ema.updates == 200


def test_weight_of_the_initial_value_without_warmup():
    # 0.9999^5000 = 61 %, which is why the default uses warmup
    path = np.concatenate([[1.0], np.zeros(5000)])
    ema = EMA(0.9999, warmup=False)
    _run(ema, path)
    assert _averages(ema)[0] == pytest.approx(0.6065, abs=1e-4)


def test_half_life_of_edm():
    # decay = 2^(-batch/h) with h = min(half_life, ramp * images seen); the initial value has weight 0
    path = _path(300)
    ema = HalfLifeEMA(half_life=1000, ramp=0.05, batch_size=128)
    _run(ema, path)
    expected = 0.0
    for n, weight in enumerate(path[1:]):
        h = min(1000, 0.05 * 128 * n)
        decay = 0.5 ** (128 / h) if h else 0.0
        expected = decay * expected + (1 - decay) * weight
    assert _averages(ema) == pytest.approx([expected], rel=1e-12)
    assert ema.decay == pytest.approx(0.5**0.128)


@pytest.mark.parametrize("make", [EMA, HalfLifeEMA, PowerEMA])
def test_averages_in_main_memory_equal_those_on_the_device(make, monkeypatch):
    # the arithmetic of an accelerator, on the CPU
    monkeypatch.setattr("src.training.ema.is_free_to_read", lambda _: False)
    torch.manual_seed(0)
    network = nn.Linear(8, 8)
    there, here = make(), make(device="cpu")
    for ema in (there, here):
        ema.start(network)
    for step in range(20):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        finite = torch.tensor(step % 5 != 3)
        for ema in (there, here):
            ema.updates = step
            ema.update(network, finite)
    for one, other in zip(there.averages, here.averages, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert not torch.equal(one["weight"], network.weight)


def test_averages_lie_on_the_cpu_or_with_the_weights():
    with pytest.raises(ValueError, match=r"^device must be cpu, or null"):
        EMA(device="cuda")


def test_exponents_of_edm2():
    # published: gamma = 16.97 for sigma_rel = 0.05 and 6.94 for 0.10
    assert post_hoc.exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert post_hoc.exponent(0.10) == pytest.approx(6.94, abs=0.005)
    assert post_hoc.exponent(12**-0.5) == pytest.approx(0, abs=1e-6)
    for gamma in (0.5, 3.0, 40.0):
        std = ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5
        assert post_hoc.exponent(std) == pytest.approx(gamma, rel=1e-9)


def test_power_function_weighs_steps_by_their_power():
    path, stds = _path(2000), (0.05, 0.15)
    ema = PowerEMA(stds, snapshot_every=0)
    _run(ema, path)
    t = np.arange(1, 2001)
    for average, std in zip(_averages(ema), stds, strict=True):
        gamma = post_hoc.exponent(std)
        profile = t**gamma / (t**gamma).sum()
        # the profile of the recursion equals t^gamma up to a relative error of gamma/n
        assert average == pytest.approx((profile * path[1:]).sum(), rel=0.02)
        relative = np.sqrt((profile * t**2).sum() - (profile * t).sum() ** 2) / 2000
        assert relative == pytest.approx(std, rel=0.01)
    assert ema.name == "ema std=0.05"


@pytest.mark.parametrize("std", [0.05, 0.07, 0.1, 0.13, 0.2])
def test_average_of_any_length_is_synthesised_from_snapshots(std, tmp_path):
    path = _path(4000)
    stored = PowerEMA((0.05, 0.10), snapshot_every=500)
    _run(stored, path, tmp_path)
    assert len(list((tmp_path / "ema").iterdir())) == 8
    wanted = PowerEMA((std,), snapshot_every=0)
    _run(wanted, path)
    made = post_hoc.synthesise(tmp_path / "ema", std, 4000)["weight"].item()
    # the standard deviation of the path is 3; the tolerance is smaller for lengths near the stored ones
    assert made == pytest.approx(_averages(wanted)[0], abs=0.02 if std <= 0.13 else 0.1)
    assert abs(_averages(stored)[0] - _averages(stored)[1]) > 0.05


def test_stored_profile_is_reproduced_exactly():
    stored = [(1000, 6.94), (2000, 6.94), (2000, 16.97)]
    np.testing.assert_allclose(post_hoc.coefficients(stored, (2000, 16.97)), [0, 0, 1], atol=1e-8)


def test_inner_product_is_the_integral_of_the_profiles():
    t = (np.arange(200_000) + 0.5) / 200_000 * 900  # midpoint rule up to the earlier end
    for (a, ga), (b, gb) in [((900, 3.0), (1500, 8.0)), ((1500, 2.0), (900, 5.0))]:
        integrand = (ga + 1) * t**ga / a ** (ga + 1) * (gb + 1) * t**gb / b ** (gb + 1)
        ours = post_hoc._inner_product(a, ga, b, gb)
        assert ours == pytest.approx(integrand.sum() * 900 / 200_000, rel=1e-6)


def test_snapshots_of_later_steps_are_set_aside(tmp_path):
    """After resuming at step 50, the snapshots of steps 60 to 100 belong to another history."""
    path = _path(100)
    first = PowerEMA((0.05, 0.10), snapshot_every=10)
    _run(first, path[:51], tmp_path)
    state = deepcopy(first.state_dict())
    _run(first, path + 100, tmp_path, start=50)
    resumed = SimpleNamespace(global_step=50, default_root_dir=str(tmp_path), is_global_zero=True)
    Checkpoints(tmp_path / "checkpoints", {}).on_train_start(resumed, None)
    second = PowerEMA((0.05, 0.10), snapshot_every=30)
    second.load_state_dict(state)
    _run(second, path, tmp_path, start=50)
    kept = [post_hoc.step_of(each) for each in post_hoc.snapshots(tmp_path / "ema")]
    assert kept == [*range(10, 51, 10), 60, 90, 100]
    assert len(list((tmp_path / "ema").glob("*.set_aside"))) == 5


def test_averages_of_a_bfloat16_network_are_kept_in_float32(tmp_path):
    """Increments of 1/1000 are below the resolution of bfloat16: a bfloat16 average would not change."""
    network = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(network.weight, 0)
    averages = [
        EMA(0.999, warmup=False),
        HalfLifeEMA(half_life=693, batch_size=1, ramp=1e9),
        PowerEMA((0.05,), 0),
    ]
    for ema in averages:
        ema.start(network)
    nn.init.constant_(network.weight, 1)
    for step in range(1000):
        for ema in averages:
            ema.update(network, torch.tensor(True))
            ema.updates = step + 1
    # the first is 1 - 0.999^1000; the second, with the same decay, and the third give the initial value weight 0
    assert averages[0].weights["weight"].item() == pytest.approx(1 - 0.999**1000, rel=1e-4)
    assert averages[1].weights["weight"].item() == averages[2].weights["weight"].item() == 1
    nn.init.constant_(network.weight, 2)
    for ema in averages[1:]:
        ema.update(network, torch.tensor(True))
        assert 1 < ema.weights["weight"].item() < 1.02
    own = network.weight.clone()
    with averages[0].applied(network):
        assert network.weight.dtype == torch.bfloat16
        assert network.weight.item() == averages[0].weights["weight"].bfloat16().item()
    assert torch.equal(network.weight, own)
    post_hoc.save(tmp_path, 1, (0.05,), averages[2].averages)
    assert post_hoc.synthesise(tmp_path, 0.05, 1)["weight"].dtype == torch.float32


def test_averages_stored_in_bfloat16_are_converted_to_float32():
    network = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    ema = EMA(0.999)
    ema.load_state_dict({"weights": {"weight": torch.ones(1, 1).bfloat16()}, "others": [], "updates": 7})
    ema.start(network)
    assert ema.weights["weight"].dtype == torch.float32
    assert ema.weights["weight"].item() == 1


def test_averages_that_are_not_finite_are_never_written(tmp_path, caplog):
    path = _path(20)
    path[15] = np.nan
    _run(PowerEMA((0.05,), snapshot_every=10), path, tmp_path)
    assert [kept.name for kept in post_hoc.snapshots(tmp_path / "ema")] == ["step_00000010.safetensors"]
    assert "0/weight is not finite" in caplog.text


def test_a_missing_snapshot_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^weights=0.07: .* has no snapshot of step 10"):
        post_hoc.synthesise(tmp_path, 0.07, 10)


@pytest.mark.parametrize(
    "make", [lambda: EMA(0.9), lambda: HalfLifeEMA(batch_size=8), lambda: PowerEMA((0.05, 0.1), 0)]
)
def test_resumed_average_equals_that_of_an_uninterrupted_run(make):
    path = _path(100)
    once, first, second = make(), make(), make()
    _run(once, path)
    _run(first, path[:51])
    second.load_state_dict(first.state_dict())
    _run(second, path, start=50)
    assert _averages(second) == _averages(once)
    assert all(ema.state_key == "EMA" for ema in (once, first, second))


def test_applied_restores_the_weights():
    ema = EMA(0.9)
    network = _run(ema, _path(20))
    own = network.weight.item()
    seen = []

    def fail():
        with ema.applied(network):
            seen.append(network.weight.item())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert seen == _averages(ema) != [own]
    assert network.weight.item() == own


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: EMA(1.0), "decay"),
        (lambda: HalfLifeEMA(half_life=0), "half_life"),
        (lambda: HalfLifeEMA(ramp=0), "ramp"),
        (lambda: PowerEMA(()), "stds"),
        (lambda: PowerEMA((0.5,)), "stds"),
        (lambda: PowerEMA(snapshot_every=-1), "snapshot_every"),
    ],
)
def test_invalid_arguments_are_refused(make, name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        make()

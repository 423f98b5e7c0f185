"""Non-finite steps are skipped, on the host or on the device; on the device, the host never synchronises."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from src.errors import UserError
from src.training.callbacks import TrainingCurves
from src.training.ema import EMA, HalfLifeEMA, PowerEMA
from src.training.nonfinite import SkipNonFinite, clip_or_skip

NAN_AT = 3
AVERAGES = [
    lambda: EMA(0.9),
    lambda: EMA(0.999, warmup=False),
    lambda: HalfLifeEMA(100, 0.5, 8),
    lambda: PowerEMA((0.05, 0.1), 0),
]


@pytest.fixture
def device_path(monkeypatch):
    """Treats the CPU as an accelerator, whose values the host does not read."""
    for module in ("nonfinite", "ema"):
        monkeypatch.setattr(f"src.training.{module}.is_free_to_read", lambda number: False)


def _steps(number, make_optimizer, ema, scaler=None, poison=NAN_AT):
    """The states after each step of a small training; the gradient of one step is NaN."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))
    optimizer = make_optimizer(network.parameters())
    ema.start(network)
    states, norms = [], []
    for step in range(number):
        loss = network(torch.randn(16, 4)).square().mean() * (float("nan") if step == poison else 1.0)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # Lightning unscales gradients only for these optimisers
        norm = clip_or_skip(optimizer, network.parameters(), 0.1, scaler)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        ema.update(network, norm.isfinite())
        ema.updates = step + 1
        norms.append(norm.item())
        parts = (network.state_dict(), optimizer.state_dict()["state"], ema.averages)
        states.append(deepcopy(parts))
    return states, norms


def _tensors(content):
    if torch.is_tensor(content):
        return [content]
    return [
        t for each in (content.values() if isinstance(content, dict) else content) for t in _tensors(each)
    ]


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(_tensors(a), _tensors(b), strict=True))


FUSED = {
    "adam": lambda p: torch.optim.Adam(p, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, fused=True, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
}
WAITING = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}


@pytest.mark.parametrize("make_ema", AVERAGES)
@pytest.mark.parametrize("name", FUSED)
def test_nonfinite_step_updates_nothing_on_the_device(device_path, name, make_ema):
    states, norms = _steps(6, FUSED[name], make_ema())
    assert not torch.tensor(norms[NAN_AT]).isfinite()
    assert _equal(states[NAN_AT], states[NAN_AT - 1])
    for step in {1, 2, 4, 5}:
        assert not _equal(states[step], states[step - 1])
        assert all(tensor.isfinite().all() for tensor in _tensors(states[step]))


@pytest.mark.parametrize("name", WAITING)
def test_other_optimizers_synchronise(device_path, name):
    states, _ = _steps(6, WAITING[name], EMA(0.9))
    assert _equal(states[NAN_AT], states[NAN_AT - 1])
    assert not _equal(states[NAN_AT + 1], states[NAN_AT])


@pytest.mark.parametrize("name", FUSED)
def test_device_and_host_skip_the_same_steps(monkeypatch, name):
    plain, norms = _steps(6, FUSED[name], EMA(0.9))
    for module in ("nonfinite", "ema"):
        monkeypatch.setattr(f"src.training.{module}.is_free_to_read", lambda number: False)
    ours, device_norms = _steps(6, FUSED[name], EMA(0.9))
    for host, device in zip(plain, ours, strict=True):
        assert _equal(host[:2], device[:2]), "weights or moments differ"
        torch.testing.assert_close(device[2], host[2], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(device_norms, norms, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("make", [FUSED["adam"], WAITING["adam"]])
@pytest.mark.parametrize("on_device", [False, True])
def test_gradients_are_clipped_by_their_unscaled_norm(monkeypatch, make, on_device):
    """precision=16-mixed: fused optimisers unscale gradients in their step, after clipping."""
    plain, norms = _steps(3, make, EMA(0.9), poison=None)
    if on_device:
        for module in ("nonfinite", "ema"):
            monkeypatch.setattr(f"src.training.{module}.is_free_to_read", lambda number: False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled, scaled_norms = _steps(3, make, EMA(0.9), scaler, poison=None)
    torch.testing.assert_close(scaled_norms, norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled[-1][0], plain[-1][0], rtol=1e-4, atol=1e-6)


def _trainer(folder):
    logged = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: logged.append((step, metrics)))
    return SimpleNamespace(global_step=0, loggers=[logger], default_root_dir=str(folder)), logged


def _count(callback, trainer, norms):
    for norm in norms:
        trainer.global_step += 1
        module = SimpleNamespace(gradient_norm=torch.tensor(norm))
        callback.on_train_batch_end(trainer, module, None, None, 0)


NAN = float("nan")


def test_skipped_steps_are_counted(tmp_path):
    trainer, logged = _trainer(tmp_path)
    callback = SkipNonFinite(stop_after=3)
    callback.on_train_start(trainer, None)
    _count(callback, trainer, [1.0, NAN, NAN, 1.0, NAN])
    assert logged == [(step, {"train/skipped_steps": n}) for step, n in ((2, 1), (3, 2), (5, 3))]
    assert callback.state_dict() == {"skipped": 3, "in_a_row": 1}
    with pytest.raises(UserError, match="not finite 3 times in a row; lower "):
        _count(callback, trainer, [NAN, NAN])


def test_device_is_read_every_few_steps(tmp_path, device_path):
    trainer, logged = _trainer(tmp_path)
    callback = SkipNonFinite(stop_after=3)
    callback.on_train_start(trainer, None)
    _count(callback, trainer, [1.0, NAN])
    assert (logged, callback.skipped) == ([], 0)
    assert callback.state_dict() == {"skipped": 1, "in_a_row": 1}, "state_dict must include the unread steps"
    _count(callback, trainer, [NAN, 1.0, 1.0])
    assert logged == [(5, {"train/skipped_steps": 2})]
    _count(callback, trainer, [NAN, NAN])
    with pytest.raises(UserError, match=r"stopped at step 8: .* 3 times in a row"):
        _count(callback, trainer, [NAN])
    _, unread = _count(callback, trainer, [1.0]), callback._unread
    assert len(unread) == 1
    callback.on_train_start(trainer, None)
    assert callback._unread == []


def test_finite_step_between_two_reads_does_not_hide_the_failures(tmp_path, device_path):
    trainer, _ = _trainer(tmp_path)
    callback = SkipNonFinite(stop_after=3)
    callback.on_train_start(trainer, None)
    _count(callback, trainer, [1.0, NAN, NAN])
    with pytest.raises(UserError):
        _count(callback, trainer, [NAN, 1.0, 1.0])


class TestWithoutWaiting:
    """Runs on fake CUDA tensors: reading a value on the host raises."""

    @pytest.fixture(autouse=True)
    def fake(self):
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield

    @pytest.fixture(params=[torch.float32, torch.bfloat16])
    def network(self, request):
        made = {"device": "cuda", "dtype": request.param}
        network = nn.Sequential(nn.Linear(4, 8, **made), nn.Linear(8, 1, **made))
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        return network

    def test_reading_raises(self):
        with pytest.raises(DataDependentOutputException):
            bool(torch.ones((), device="cuda").isfinite())

    @pytest.mark.parametrize("make", AVERAGES)
    def test_averages(self, network, make):
        ema = make()
        ema.start(network)
        for ema.updates in range(3):
            ema.update(network, torch.ones((), device="cuda").isfinite())
        with ema.applied(network):
            pass
        assert {a.device.type for average in ema.averages for a in average.values()} == {"cuda"}
        assert {a.dtype for average in ema.averages for a in average.values()} == {torch.float32}

    def test_clipping(self, network):
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        norm = clip_or_skip(optimizer, network.parameters(), 1.0)
        assert norm.device.type == optimizer.found_inf.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):  # the optimiser without fused=True synchronises
            clip_or_skip(torch.optim.SGD(network.parameters(), fused=False), network.parameters(), 1.0)

    def test_counting(self, tmp_path):
        trainer, _ = _trainer(tmp_path)
        callback = SkipNonFinite(stop_after=5)
        callback.on_train_start(trainer, None)
        module = SimpleNamespace(gradient_norm=torch.ones((), device="cuda"))
        for _ in range(4):
            trainer.global_step += 1
            callback.on_train_batch_end(trainer, module, None, None, 0)
        assert len(callback._unread) == 4

    def test_curves(self):
        curves = TrainingCurves()
        curves._restart(0, torch.device("cuda"))
        curves.losses.add(torch.ones(8, device="cuda"), torch.rand(8))
        assert {each.device.type for each in curves.losses.read()} == {"cuda"}

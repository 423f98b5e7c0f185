"""Muon with AdamW, and schedule-free AdamW: what each parameter gets, the average, resuming, refusals."""

from copy import deepcopy

import pytest
import schedulefree
import torch
from torch import nn

from src.app.optimizers import optimizer_of
from src.errors import UserError
from src.training.optimizers import MuonAdamW, ScheduleFreeAdamW
from tests.cli.test_training import assert_identical, checkpoint, training_state
from tests.conftest import QUICK
from tests.test_conf import composed

FREE = ("optimizer=schedule_free", "optimizer.warmup_steps=3", "ema=schedule_free", "lr_schedule=constant")
FEW = (*QUICK, "metrics=none", "callbacks.sample_images.every=3", "validate_every=2")


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))


def stepped(network, optimizer, steps=3):
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.randn(8, 1, 4, 4)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in network.parameters()]


def test_muon_for_matrices_and_adamw_for_the_rest():
    pytest.importorskip("torch", minversion="2.9")
    network, other = layers(), layers()
    found = stepped(network, MuonAdamW(network.parameters(), lr=0.01, weight_decay=0.1))
    matrix, rest = [other[2].weight], [other[0].weight, other[0].bias, other[2].bias]
    muon = torch.optim.Muon(matrix, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1, fused=True)

    class Both:
        def zero_grad(self):
            muon.zero_grad(), adamw.zero_grad()

        def step(self):
            muon.step(), adamw.step()

    assert all(torch.equal(a, b) for a, b in zip(found, stepped(other, Both()), strict=True))


@pytest.mark.parametrize("kind", [MuonAdamW, ScheduleFreeAdamW])
def test_state_is_restored_and_a_step_without_gradients_changes_nothing(kind):
    network = layers()
    optimizer = kind(network.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert all(part.param_groups[0]["lr"] == 0.005 for part in optimizer.parts)
    stepped(network, optimizer)
    again = layers()
    again.load_state_dict(network.state_dict())
    other = kind(again.parameters(), lr=0.3)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    for a, b in zip(stepped(network, optimizer), stepped(again, other), strict=True):
        assert torch.equal(a, b)
    assert schedule.get_last_lr()[0] == 0.005


def test_average_is_that_of_the_packages_eval_mode():
    network, other = layers(), layers()
    optimizer = ScheduleFreeAdamW(network.parameters(), lr=0.01)
    theirs = schedulefree.AdamWScheduleFree(other.parameters(), lr=0.01, betas=(0.9, 0.999))
    theirs.train()
    stepped(network, optimizer, 5), stepped(other, theirs, 5)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    averages = [optimizer.averages()[p] for p in network.parameters()]
    theirs.eval()
    assert all(torch.equal(a, b) for a, b in zip(averages, other.parameters(), strict=True))
    assert not torch.equal(averages[0], network[0].weight)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("optimizer=muon", "model=dit_tiny", "model.width=32"), id="muon"),
        pytest.param(FREE, id="free", marks=pytest.mark.slow),
    ],
)
def test_resuming_is_exact_with_previews_and_validation(command, only_run, tmp_path, options):
    quick = [o for o in FEW if "dit" not in str(options) or "base_channels" not in o]
    assert command("train", *quick, *options, "trainer.max_steps=6") == 0
    whole = only_run().rename(tmp_path / "whole")
    assert command("train", *quick, *options, "trainer.max_steps=4") == 0
    assert command("train", f"ckpt={only_run()}", "trainer.max_steps=6") == 0
    assert_identical(training_state(whole, 6), training_state(only_run(), 6))
    if options is FREE:  # what is sampled is x, what is trained on is y
        content = checkpoint(whole, 6)
        average, state = content["callbacks"]["EMA"]["weights"], content["optimizer_states"][0]["state"]
        y = content["state_dict"]["loss.denoiser.network.time_embedding.linear1.weight"]
        x = average["time_embedding.linear1.weight"]
        z = next(s["z"] for s in state.values() if s["z"].shape == y.shape)
        torch.testing.assert_close(y, torch.lerp(z, x, 0.9), rtol=1e-4, atol=1e-6)
        assert not torch.equal(x, y)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["optimizer=schedule_free"], "choose ema=schedule_free"),
        (["ema=schedule_free"], "choose optimizer=schedule_free, or another ema"),
        (["optimizer=muon"], "Muon needs torch 2.9"),
        ([*FREE], "pip install -e '.[schedulefree]'"),
    ],
)
def test_refusals(options, words, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    monkeypatch.setattr("src.training.optimizers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=words.replace("[", r"\[").replace("(", r"\(")):
        optimizer_of(composed("train", *options))

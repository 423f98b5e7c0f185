"""Likelihoods with src.evaluate, and the stored state of importance sampling."""

import json

import pytest
import torch

from tests.conftest import QUICK, commands_in

LEARNED = ("schedule.T=60", "variance=learned_range", "loss=hybrid", "time_sampling=importance")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One short run with a learned variance and importance sampling."""
    tmp_path = tmp_path_factory.mktemp("nll")
    with pytest.MonkeyPatch.context() as patch:
        assert commands_in(tmp_path, patch)("train", *QUICK, *LEARNED) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def _scores(command, run, *options):
    assert command("evaluate", f"run={run}", "device=cpu", "n=12", *options) == 0
    newest = max((run / "scores").glob("nll*/scores.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())


def test_bound(command, run):
    record = _scores(command, run, "metrics=nll")
    scores, curve = record["scores"], record["curve"]["bits_per_dim"]
    assert len(curve) == 61  # the prior and 60 steps
    assert scores["bits_per_dim"] == pytest.approx(sum(curve), rel=1e-6)
    assert all(low < scores[name] < high for name, (low, high) in record["intervals"].items())
    assert record["protocol"]["num_images"] == 12
    assert record["protocol"]["variance"] == "LearnedRange()"
    in_batches = _scores(command, run, "metrics=nll", "batch_size=5")
    assert in_batches["protocol"] == record["protocol"]
    assert in_batches["scores"] == pytest.approx(scores, rel=1e-5)
    assert _scores(command, run, "metrics=nll", "seed=1")["scores"] != scores
    # a run with a learned variance can be evaluated with a fixed one
    fixed = _scores(command, run, "metrics=nll", "variance=small")
    assert fixed["scores"]["bits_per_dim"] != scores["bits_per_dim"]


def test_flow(command, run):
    record = _scores(command, run, "metrics=nll_flow", "metrics.tolerance=0.05", "n=3")
    assert 0 < record["scores"]["bits_per_dim_flow"] < 100
    # the flow depends on neither option
    other = ("clipping=none", "variance=large")
    again = _scores(command, run, "metrics=nll_flow", "metrics.tolerance=0.05", "n=3", *other)
    assert again == record


def test_bound_needs_a_discrete_schedule(command, tmp_path, capsys):
    assert command("train", *QUICK, "schedule=vp", "trainer.max_steps=1", "callbacks=none") == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert command("evaluate", f"run={folder}", "metrics=nll", "device=cpu") == 2
    err = capsys.readouterr().err
    assert "metrics: schedule must be discrete" in err
    assert "choose metrics=nll_flow" in err


def test_importance_state_is_saved_in_the_checkpoint(run):
    (path,) = (run / "checkpoints").glob("step_*.ckpt")
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]["loss.time_sampling._extra_state"]
    assert state["seen"].sum() == content["global_step"] * 32  # one loss per image of every batch

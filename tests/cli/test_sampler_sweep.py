"""A sweep over samplers of one checkpoint loads it once, and gives what single commands give."""

import json

import pytest

from src.app import load, restore
from src.evaluation.record import Record
from src.evaluation.scores import ScoreSet
from tests.conftest import QUICK, commands_in

OPTIONS = (
    "n=64",
    "batch_size=32",
    "device=cpu",
    "metrics=[fd_digits,kd_digits]",
    "metrics.kd_digits.subset_size=32",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        assert commands_in(tmp_path, patch)("train", *QUICK, "callbacks=none", "metrics=none") == 0
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def test_model_and_references_are_loaded_once(command, run, tmp_path, monkeypatch):
    counts = {"weights": 0, "references": 0}

    def counted(name, function):
        def call(*arguments, **named):
            counts[name] += 1
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(load, "load_weights", counted("weights", restore.load_weights))
    monkeypatch.setattr(ScoreSet, "set_references", counted("references", ScoreSet.set_references))
    varied = ["sampler.steps=2,3", "seed=0,1", "spacing=trailing,leading"]
    assert command("evaluate", "-m", f"run={run}", *OPTIONS, *varied) == 0
    assert counts == {"weights": 1, "references": 1}
    found = {}
    for path in (tmp_path / "runs" / "sweeps").glob("*/*/outcome.json"):
        outcome = json.loads(path.read_text())
        found[tuple(outcome["overrides"][-3:])] = outcome["scores"]
        assert Record.read(path.parent / "scores.json").intervals, "of the job's own protocol"
    assert len(found) == 8
    for path in (run / "scores").glob("*/scores.json"):
        path.unlink()
    single = ("sampler.steps=3", "seed=1", "spacing=trailing")
    assert command("evaluate", f"run={run}", *OPTIONS, *single) == 0
    assert counts["weights"] == 2
    (path,) = (run / "scores").glob("*/scores.json")
    scores = json.loads(path.read_text())["scores"]
    assert found[single] == {**scores, "evaluations": 3}
    assert len({each["fd_digits"] for each in found.values()}) == 8

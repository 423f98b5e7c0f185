"""`budget`: the number of steps that fit into a time."""

import pytest
from omegaconf import OmegaConf

from src.app import budget
from tests.conftest import QUICK


def probed(monkeypatch, start: float, step: float) -> None:
    """Replaces the probe by steps of known length."""

    def probe(config, folder, watch):
        watch.seconds = [start / budget.WARM_UP] * budget.WARM_UP + [step] * budget.PROBED

    monkeypatch.setattr(budget, "probe", probe)


def test_a_budget_is_trained_and_a_continued_run_keeps_its_steps(
    command, only_run, monkeypatch, capsys, caplog
):
    probed(monkeypatch, start=2.0, step=0.1)
    options = [*QUICK, "callbacks=none", "metrics=none"]
    assert command("train", *options, "budget=2.56") == 0
    run = only_run()
    # the start takes 2 s of the 2.56; the rest are steps of 0.1 s
    steps = budget.WARM_UP + 5
    assert OmegaConf.load(run / "config.yaml").trainer.max_steps == steps
    assert (run / "checkpoints" / f"step_{steps:08}.ckpt").is_file()

    probed(monkeypatch, start=0.0, step=0.01)  # a faster machine would make more steps
    assert command("train", f"ckpt={run}", "budget=2.56") == 2
    assert f"is at step {steps} already" in capsys.readouterr().err
    assert command("train", f"ckpt={run}", "budget=9") == 2
    assert "budget=9: this training began with budget=2.56; give trainer.max_steps" in capsys.readouterr().err
    assert command("train", f"ckpt={run}", f"trainer.max_steps={steps + 2}") == 0
    assert (run / "checkpoints" / f"step_{steps + 2:08}.ckpt").is_file()


def test_a_probe_takes_steps_without_leaving_anything(command, only_run, monkeypatch):
    monkeypatch.setattr(budget, "SECONDS", 0.05)
    watches = []
    monkeypatch.setattr(budget, "StopWatch", lambda *given: watches.append(StopWatch(*given)) or watches[-1])
    assert command("train", *QUICK, "callbacks=none", "metrics=none", "budget=0.2") == 0
    [watch] = watches
    assert len(watch.seconds) >= budget.WARM_UP + budget.PROBED
    assert min(watch.seconds) > 0
    assert OmegaConf.load(only_run() / "config.yaml").trainer.max_steps >= 1


StopWatch = budget.StopWatch


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["budget=inf"], ["budget=inf: give a number of seconds"]),
        (["trainer.max_steps=5", "budget=1"], ["budget", "trainer.max_steps follows from it"]),
        (["trainer=ddp", "trainer.devices=2", "budget=1"], ["budget", "several", "give trainer.max_steps"]),
    ],
)
def test_a_budget_that_is_impossible(options, parts, command, capsys):
    assert command("train", *QUICK, *options) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in parts)

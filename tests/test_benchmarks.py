"""The benchmarks run; their numbers are not checked."""

import json
import sys

import pytest

from benchmarks import framework, gpu, speedrun
from benchmarks.report import spread
from src.runs.files import write_json


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "n": 3, "text": "1-3"}


def test_a_bare_loop_and_a_training_are_timed():
    steps = framework.WARM_UP + 10
    assert 0 < framework.bare(steps) < framework.ours(steps, framework.CALLBACKS)


def test_the_table_of_a_speed_run_has_the_best_row_first(monkeypatch, tmp_path, capsys):
    for seed, (v, eps) in enumerate([(5.0, 7.0), (6.0, 9.0), (1.0, None)]):  # one job has not ended
        for row, score in (("eps", eps), ("v", v)):
            job = tmp_path / f"{seed}_{row}"
            job.mkdir()
            (job / "config.yaml").write_text("budget: 60\ntrainer:\n  max_steps: 600\n")
            if score is not None:
                outcome = {
                    "overrides": [f"seed={seed}", f"speedrun={row}"],
                    "scores": {speedrun.SCORE: score},
                }
                write_json(job / "outcome.json", outcome)
    monkeypatch.setattr(sys, "argv", ["speedrun", str(tmp_path)])
    speedrun.main()
    first, _, _, _, *rows = capsys.readouterr().out.splitlines()
    assert first == "5 trainings, budget 60 s"
    assert rows[0].startswith("| v | 600 | 100 | 5.50 ± 6.35 | - | 2 |")
    assert rows[1].startswith("| eps | 600 | 100 | 8.00 ± 12.71 | 2.50 ± 6.35 | 2 |")


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu(monkeypatch, tmp_path, capsys):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(sys, "argv", ["gpu", "--smoke", "--json", str(tmp_path / "out.json")])
    gpu.main()
    results = json.loads((tmp_path / "out.json").read_text())
    assert {row["network"] for row in results["training"]} >= {"UNet, tiny", "DiT, tiny", "diffusers"}
    assert set(results["images_per_second"]) == {"sampling, DDIM with 50 steps", "features of InceptionV3"}
    assert "minutes for 50,000 images" in capsys.readouterr().out

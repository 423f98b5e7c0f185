"""The benchmarks run; their numbers are not checked."""

import json
import sys

import pytest
import torch

from benchmarks import framework, gpu, speedrun
from benchmarks.report import spread
from src.runs.files import write_json


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "n": 3, "text": "1-3"}


def test_a_bare_loop_and_a_training_are_timed():
    steps = framework.WARM_UP + 10
    assert framework.bare(steps) > 0
    assert framework.ours(steps, framework.CALLBACKS) > 0


def test_the_table_of_a_speed_run_has_the_best_row_first(monkeypatch, tmp_path, capsys):
    for seed, (v, eps) in enumerate([(5.0, 7.0), (6.0, 9.0), (1.0, None)]):  # one job has not ended
        for row, score in (("eps", eps), ("v", v)):
            job = tmp_path / f"{seed}_{row}"
            job.mkdir()
            (job / "config.yaml").write_text(
                f"seed: {seed}\nbudget: 60\ntrainer:\n  max_steps: {(600, 600, 900)[seed]}\n"
            )
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


def test_trainings_of_other_budgets_are_not_ranked(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["speedrun", str(tmp_path)])
    with pytest.raises(SystemExit, match="no training has ended"):
        speedrun.main()
    for budget in (60, 1200):
        job = tmp_path / str(budget)
        job.mkdir()
        (job / "config.yaml").write_text(f"seed: 0\nbudget: {budget}\ntrainer:\n  max_steps: 600\n")
        write_json(job / "outcome.json", {"overrides": ["speedrun=v"], "scores": {speedrun.SCORE: 1.0}})
    with pytest.raises(SystemExit, match="these have 60 s, 1200 s"):
        speedrun.main()


@pytest.mark.parametrize(("network", "millions"), [(gpu.unet, 35.7), (gpu.ddpmpp, 55.7), (gpu.dit_xl, 673.7)])
def test_networks_of_the_gpu_benchmark(network, millions):
    with torch.device("meta"):
        built = network()
        assert built(torch.empty(2, *built.image_shape), torch.ones(2)).shape == (2, *built.image_shape)
    assert sum(weight.numel() for weight in built.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_the_gpu_benchmark_uses_tf32_only_where_it_says_so(monkeypatch, capsys):
    seen = []

    def spy(name, result):
        def call(*_):
            seen.append(
                (name, torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
            )
            return result

        return call

    real = gpu.training
    monkeypatch.setattr(gpu, "rows", lambda smoke: [gpu.Row("UNet", gpu.tiny, 2, "tf32")])
    monkeypatch.setattr(gpu, "training", lambda *given: (real(*given), spy("training", None)())[0])
    monkeypatch.setattr(gpu, "diffusers", spy("peer", [(1.0, 1.0)] * 4))
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu, "sampling", spy("sampling", 1.0))
    monkeypatch.setattr(gpu, "scoring", spy("scoring", 1.0))
    monkeypatch.setattr(sys, "argv", ["gpu", "--smoke"])
    try:
        gpu.main()
    finally:
        gpu.set_float32("float32")
    exact = ("ieee", "ieee")
    assert seen == [
        ("training", "tf32", "tf32"),
        ("peer", *exact),
        ("peer", *exact),
        ("sampling", *exact),
        ("scoring", *exact),
    ]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu(monkeypatch, tmp_path, capsys):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(sys, "argv", ["gpu", "--smoke", "--json", str(tmp_path / "out.json")])
    gpu.main()
    results = json.loads((tmp_path / "out.json").read_text())
    assert {row["network"] for row in results["training"]} >= {"UNet, tiny", "DiT, tiny", "diffusers"}
    assert set(results["images_per_second"]) == {"sampling, DDIM with 50 steps", "features of InceptionV3"}
    assert "minutes for 50,000 images" in capsys.readouterr().out

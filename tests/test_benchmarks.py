"""The benchmarks run; their numbers are not checked."""

import json
import sys

import pytest

from benchmarks import framework, gpu
from benchmarks.report import spread


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "n": 3, "text": "1-3"}


def test_a_bare_loop_and_a_training_are_timed():
    steps = framework.WARM_UP + 10
    assert 0 < framework.bare(steps) < framework.ours(steps, framework.CALLBACKS)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu(monkeypatch, tmp_path, capsys):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(sys, "argv", ["gpu", "--smoke", "--json", str(tmp_path / "out.json")])
    gpu.main()
    results = json.loads((tmp_path / "out.json").read_text())
    assert {row["network"] for row in results["training"]} >= {"UNet, tiny", "DiT, tiny", "diffusers"}
    assert set(results["images_per_second"]) == {"sampling, DDIM with 50 steps", "features of InceptionV3"}
    assert "minutes for 50,000 images" in capsys.readouterr().out

"""Typical compositions: each trains, previews, scores and saves."""

import pytest
import torch
from torch._dynamo.utils import counters

from src.evaluation.record import Record
from tests.conftest import QUICK

COMPOSITIONS = {
    "README's": ["schedule=cosine", "model=unet_small"],
    "other choices": [
        "schedule=sigmoid",
        "sampler=ddpm",
        "sampler.steps=4",
        "variance=large",
        "spacing=linspace",
    ],
    "no average, no clipping": [
        "ema=none",
        "clipping=none",
        "lr_schedule=warmup_cosine",
        "lr_schedule.warmup_steps=2",
    ],
    "class-conditional": ["class_conditional=true", "optimizer=adamw", "ema=constant"],
    "bfloat16": ["trainer.precision=bf16-mixed", "lr_schedule=constant", "schedule=linear", "schedule.T=100"],
    "bfloat16 weights": ["trainer.precision=bf16-true", "class_conditional=true"],
    "float64 weights": ["trainer.precision=64-true"],
    "two scores": ["metrics=[fd_digits,kd_digits]", "metrics.kd_digits.subset_size=100"],
    "a wrapper inside the clipping": [
        "+wrappers.bound={_target_: src.diffusion.clipping.StaticClipping, bound: 0.5}"
    ],
    "guided": ["conditioning=class", "conditioning.dropout=0.2", "guidance=classifier_free"],
    "no score": ["metrics=none"],
    "overfit": ["debug=overfit", "trainer.max_steps=4", "callbacks=none"],
}


SLOW = (
    "no average, no clipping",
    "bfloat16",
    "a wrapper inside the clipping",
    "no score",
    "class-conditional",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in COMPOSITIONS]
)
def test_composition(command, only_run, name):
    assert command("train", *QUICK, *COMPOSITIONS[name]) == 0
    run = only_run()
    scores = Record.read(run / "scores.json").scores
    assert ("fd_digits" in scores) == (name not in ("no score", "overfit"))
    assert all(value == value for value in scores.values()), "no NaN"
    assert command("sample", f"run={run}", "n=2", "sampler.steps=2") == 0


def test_labels_reach_the_network(command, only_run):
    assert command("train", *QUICK, "class_conditional=true", "callbacks.checkpoints.every=10") == 0

    def table(step):
        path = only_run() / "checkpoints" / f"step_{step:08d}.ckpt"
        weights = torch.load(path, weights_only=True)["state_dict"]
        (rows,) = [weight for weight in weights.values() if weight.dim() == 2 and weight.shape[0] == 11]
        return rows

    moved = (table(20) != table(10)).any(dim=1)
    assert moved[:10].all(), "the embedding of a class did not change"
    assert not moved[10], "the embedding of no class changed without dropped labels"


@pytest.mark.slow(reason="compiling takes a minute or more")
def test_compiled_training_equals_the_plain_one(command, tmp_path):
    trained = []
    torch.compiler.reset()
    counters.clear()
    for compiled in ("true", "false"):
        options = [
            f"compile={compiled}",
            "trainer.precision=64-true",
            "trainer.max_steps=5",
            "callbacks=none",
        ]
        assert command("train", *QUICK, *options, f"hydra.run.dir={tmp_path / compiled}") == 0
        path = tmp_path / compiled / "checkpoints" / "step_00000005.ckpt"
        trained.append(torch.load(path, weights_only=True)["state_dict"])
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    torch.testing.assert_close(*trained, rtol=1e-7, atol=1e-9)


@pytest.mark.slow(reason="compiling takes a minute or more")
def test_compiled_network_resumes(command, only_run):
    assert command("train", *QUICK, "compile=true", "trainer.max_steps=3", "callbacks=none") == 0
    assert command("train", "ckpt=last", "trainer.max_steps=6", "compile=false") == 0
    names = torch.load(only_run() / "checkpoints" / "step_00000006.ckpt", weights_only=True)["state_dict"]
    assert not any("_orig_mod" in name for name in names)

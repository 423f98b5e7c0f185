"""A resumed run reports how exactly it continues; a changed experiment is refused unless allowed."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from src.app.options import effect_of
from src.runs.files import sidecar_path
from src.runs.folder import LOCK_FILE, locked
from src.training.resume import compare, flat
from tests.faults.processes import Replacement, resume, run, run_folder, train
from tests.faults.states import training_state

ORIGIN = {
    "data": "a" * 64,
    "code": {"format": "1", "modules": {"src.model.unet": "1", "src.diffusion.loss": "1"}},
    "world_size": 1,
    "accumulation": 1,
    "machine": {"torch": "2.9.0", "device": "cpu", "threads": "1"},
    "config": flat({"seed": 0, "batch_size": 16, "optimizer": {"lr": 0.1}, "logger": {"csv": {"x": 1}}}),
    "paired": "",
    "deterministic": True,
}


@pytest.mark.parametrize(
    ("change", "expected", "word"),
    [
        ({}, "bit-exact", None),
        ({"config": {**ORIGIN["config"], "logger.csv.x": 2, "trainer.max_steps": 9}}, "bit-exact", None),
        ({"world_size": 2}, "order-exact", "world_size"),
        ({"accumulation": 2}, "order-exact", "accumulation"),
        ({"config": {**ORIGIN["config"], "batch_size": 32}}, "order-exact", "batch_size"),
        ({"machine": {**ORIGIN["machine"], "torch": "2.10.0"}}, "order-exact", "torch: 2.9.0 -> 2.10.0"),
        ({"deterministic": False}, "order-exact", "deterministic"),
        ({"config": {**ORIGIN["config"], "optimizer.lr": 0.2}}, "approximate", "optimizer.lr: 0.1 -> 0.2"),
        ({"config": {**ORIGIN["config"], "seed": 1}}, "approximate", "seed: 0 -> 1"),
        ({"data": "b" * 64}, "approximate", "fingerprint aaaaaaaaaaaa -> bbbbbbbbbbbb"),
        (
            {"code": {"format": "1", "modules": {"src.model.unet": "2", "src.diffusion.loss": "1"}}},
            "approximate",
            "code: src.model.unet has changed",
        ),
        ({"code": {"format": "2", "modules": {}}}, "approximate", "cannot be compared"),
        ({"data": None}, "approximate", "fingerprint aaaaaaaaaaaa -> None"),
    ],
)
def test_levels(change, expected, word):
    found = compare(ORIGIN, {**ORIGIN, **change}, effect_of)
    assert found.level == expected
    assert [word in difference for difference in found.differences] == ([] if word is None else [True])


def test_effects_of_options_are_an_argument():
    effects = {"seed": "order", "batch_size": "none", "optimizer.lr": "tuning", "logger.csv.x": "experiment"}
    now = {**ORIGIN, "config": {"seed": 1, "batch_size": 2, "optimizer.lr": 3, "logger.csv.x": 4}}
    found = compare(ORIGIN, now, effects.get)
    assert found.experiment == ["logger.csv.x: 1 -> 4", "optimizer.lr: 0.1 -> 3"]
    assert found.rounding == ["seed"]
    assert effect_of("optimizer.lr") == "tuning"
    assert effect_of("optimizers") == "experiment", "a prefix of a name must not match"


OURS = {"callbacks.x._target_": "src.training.callbacks.SampleImages", "callbacks.x.n": 4}
PASSIVE = {"callbacks.x._target_": "lightning.pytorch.callbacks.EarlyStopping"}
PRUNING = {"callbacks.x._target_": "lightning.pytorch.callbacks.ModelPruning", "callbacks.x.amount": 0.5}


@pytest.mark.parametrize(
    ("before", "after", "expected", "refused"),
    [
        ({}, OURS, "bit-exact", False),
        ({}, PASSIVE, "bit-exact", False),
        ({}, PRUNING, "approximate", True),
        (PRUNING, {}, "approximate", True),
        (PRUNING, {**PRUNING, "callbacks.x.amount": 0.1}, "approximate", True),
        (PRUNING, PRUNING, "approximate", False),
        ({}, {"callbacks.x._target_": "mypackage.EarlyStopping"}, "approximate", True),
    ],
)
def test_callbacks_that_may_change_the_training(before, after, expected, refused):
    then, now = ({**ORIGIN, "config": {**ORIGIN["config"], **each}} for each in (before, after))
    found = compare(then, now, effect_of)
    assert (found.level, bool(found.experiment)) == (expected, refused)


def _edit(folder: Path, change) -> None:
    """Changes the newest checkpoint, as if it had been saved by other code."""
    path = max((run_folder(folder) / "checkpoints").glob("step_*.ckpt"))
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    sidecar_path(path).unlink()


def other_loss(content):
    content["origin"]["code"]["modules"]["src.diffusion.loss"] = "0" * 12


def earlier_release(content):
    content["origin"]["code"] = {"diffusion/loss.py": "0" * 12}


def test_changed_code_is_refused_except_in_a_requeued_job(tmp_path):
    assert train(tmp_path, "trainer.max_steps=2", "metrics=none").status == 0
    _edit(tmp_path, other_loss)
    refused = resume(tmp_path, "trainer.max_steps=3")
    assert refused.status == 2
    assert "code: src.diffusion.loss has changed" in refused.output.splitlines()[-1]
    slurm = {"SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "1"}
    requeued = run(tmp_path, "train", "ckpt=last", "trainer.max_steps=3", **slurm)
    assert requeued.status == 0, requeued.output
    assert "approximate from step 2 (code: src.diffusion.loss has changed)" in requeued.output
    plain = resume(tmp_path, "trainer.max_steps=4")
    assert "bit-exact from step 3" in plain.output, plain.output


def test_the_code_of_an_earlier_release_is_not_compared(tmp_path):
    assert train(tmp_path, "trainer.max_steps=2", "metrics=none").status == 0
    _edit(tmp_path, earlier_release)
    done = resume(tmp_path, "trainer.max_steps=3")
    assert done.status == 0, done.output
    assert "code: cannot be compared, the checkpoint is from an earlier release" in done.output


def test_another_experiment_is_refused(tmp_path):
    assert train(tmp_path, "trainer.max_steps=3").status == 0
    refused = resume(tmp_path, "optimizer.lr=0.5", "trainer.max_steps=4")
    assert refused.status == 2
    assert "optimizer.lr" in refused.output.splitlines()[-1]
    assert "allow_changes=true" in refused.output.splitlines()[-1]
    allowed = resume(tmp_path, "optimizer.lr=0.5", "allow_changes=true", "trainer.max_steps=4")
    assert allowed.status == 0, allowed.output
    assert "approximate from step 3 (optimizer.lr" in allowed.output
    unfit = resume(tmp_path, "model.base_channels=16", "allow_changes=true", "trainer.max_steps=6")
    assert unfit.status == 2
    assert "weights have other shapes" in unfit.output.splitlines()[-1]


REFUSED = {
    "another experiment": ["ckpt=last", "optimizer.lr=0.5", "trainer.max_steps=6"],
    "other weights": ["ckpt=last", "model.base_channels=16", "allow_changes=true", "trainer.max_steps=6"],
    "nothing left": ["ckpt=last", "seed=1", "trainer.max_steps=2"],
    "unknown option": ["ckpt=last", "optimizer.rate=1"],
    "a mistake": ["ckpt=last", "seed=-1", "trainer.max_steps=6"],
}


def content(folder: Path) -> dict[str, bytes]:
    """The content of all files except the lock, by path."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_refusal_does_not_change_the_folder(tmp_path):
    assert train(tmp_path, "trainer.max_steps=3").status == 0
    folder = run_folder(tmp_path)
    before = content(folder)
    for case, arguments in REFUSED.items():
        refused = run(tmp_path, "train", *arguments)
        assert refused.status == 2, f"{case}: {refused.output}"
        assert content(folder) == before, case
    with locked(folder):
        for arguments in (
            ["ckpt=last", "seed=1", "allow_changes=true"],
            ["seed=1", f"hydra.run.dir={folder}"],
        ):
            refused = run(tmp_path, "train", *arguments, "trainer.max_steps=6")
            assert refused.status == 2, refused.output
            assert "in use" in refused.output
            assert content(folder) == before, arguments
    plain = resume(tmp_path, "trainer.max_steps=4")
    assert plain.status == 0, plain.output
    assert "bit-exact from step 3" in plain.output


def test_allow_changes_is_not_stored(tmp_path):
    assert train(tmp_path, "trainer.max_steps=1", "allow_changes=true").status == 0
    allowed = resume(tmp_path, "optimizer.lr=0.5", "++allow_changes=true", "trainer.max_steps=2")
    assert allowed.status == 0, allowed.output
    refused = resume(tmp_path, "optimizer.lr=0.25", "trainer.max_steps=3")
    assert refused.status == 2
    assert "optimizer.lr: 0.5 -> 0.25" in refused.output.splitlines()[-1]
    plain = resume(tmp_path, "trainer.max_steps=3")
    assert plain.status == 0, plain.output
    assert "bit-exact from step 2" in plain.output


def test_the_printed_command_continues(tmp_path):
    """Also where the schedule depends on the number of steps, and with an option that belongs to one start."""
    cache = f"cache={tmp_path}/statistics"
    schedule = ("lr_schedule=warmup_cosine", "lr_schedule.warmup_steps=0")
    first = train(tmp_path, *schedule, cache, "trainer.max_steps=1", "metrics=none")
    (line,) = [line for line in first.output.splitlines() if line.startswith("  python -m src.train ")]
    done = run(tmp_path, "train", *shlex.split(line)[3:])
    assert done.status == 0, done.output
    assert cache in line
    assert (run_folder(tmp_path) / "checkpoints" / "step_00000002.ckpt").exists()


def print_rate(original, call, self, *arguments, **named):
    if len(self.param_groups[0]["params"]) > 1:  # not in the trial of `check_fits`
        print(f" rate={self.param_groups[0]['lr']} ", flush=True)
    return original(self, *arguments, **named)


RATES = Replacement("torch.optim.adam:Adam.step", print_rate)
# overrides of the first three steps, overrides of the rest, learning rate of step k in the rest, other values
RETUNED = {
    "rate": (["lr_schedule.warmup_steps=10"], ["optimizer.lr=0.5"], lambda k: 0.5 * min(1, (k + 1) / 10), {}),
    "warm-up": ([], ["lr_schedule.warmup_steps=10"], lambda k: 0.001 * min(1, (k + 1) / 10), {}),
    "no warm-up": ([], ["lr_schedule=constant"], lambda k: 0.001, {}),
    "a warm-up": (
        ["lr_schedule=constant"],
        ["lr_schedule=warmup", "lr_schedule.warmup_steps=10"],
        lambda k: 0.001 * min(1, (k + 1) / 10),
        {},
    ),
    "betas": (
        ["lr_schedule=constant"],
        ["optimizer.betas=[0.5,0.6]"],
        lambda k: 0.001,
        {"betas": (0.5, 0.6)},
    ),
}


@pytest.mark.parametrize("case", RETUNED)
def test_a_changed_optimiser_is_applied(tmp_path, case):
    first, then, rate, numbers = RETUNED[case]
    assert train(tmp_path, "optimizer.lr=0.001", *first, "trainer.max_steps=3").status == 0
    done = resume(
        tmp_path,
        *then,
        "allow_changes=true",
        "trainer.max_steps=5",
        faults=[RATES],
    )
    assert done.status == 0, done.output
    used = [float(rate) for rate in re.findall(r"rate=(\S+)", done.output)]
    assert used == pytest.approx([rate(3), rate(4)]), "the change must apply from the first step"
    content = torch.load(run_folder(tmp_path) / "checkpoints" / "step_00000005.ckpt", weights_only=True)
    (group,) = content["optimizer_states"][0]["param_groups"]
    assert group["lr"] == pytest.approx(rate(5))
    assert {name: tuple(group[name]) for name in numbers} == numbers
    assert content["optimizer_states"][0]["state"][0]["step"] == 5, "the moments were not resumed"


def test_other_images_are_refused(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(40):
        Image.new("L", (8, 8), 5 * number).save(pictures / f"{number:02d}.png")
    data = (
        "data=image_folder",
        f"data.root={pictures}",
        "data.image_size=8",
        "data.channels=1",
        "metrics=none",
    )
    cache = f"data.cache={tmp_path}/index"
    assert train(tmp_path, *data, cache, "trainer.max_steps=3").status == 0
    Image.new("L", (8, 8), 77).save(pictures / "03.png")
    refused = resume(tmp_path, "trainer.max_steps=4")
    assert refused.status == 2, refused.output
    assert "training images: fingerprint" in refused.output.splitlines()[-1]


def test_another_batch_size_neither_repeats_nor_skips_images(tmp_path):
    assert train(tmp_path, "trainer.max_steps=3").status == 0
    done = run(tmp_path, "train", "ckpt=last", "batch_size=32", "trainer.max_steps=5")
    assert done.status == 0, done.output
    assert "order-exact from step 3 (batch_size" in done.output
    assert training_state(run_folder(tmp_path), 5)["/data/samples"] == 3 * 16 + 2 * 32

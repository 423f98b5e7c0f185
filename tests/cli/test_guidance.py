"""Guidance by a second run, and classifiers, through the command line."""

import json

import pytest
import torch

from src.app.guides import check_classes, check_fit
from src.app.load import load_with
from src.app.restore import Restored
from src.app.sweep.jobs import composed as composition
from src.conditioning import ByClass, ByText, LowResolution
from src.data.codec import Pixels
from src.diffusion.clipping import StaticClipping
from src.diffusion.denoiser import Denoiser
from src.diffusion.guidance import ClassifierGuidance
from src.diffusion.parameterization import V
from src.diffusion.schedule import Cosine
from src.evaluation.record import Record
from src.generation.recipe import kind_of
from src.runs.files import file_sha256
from tests.cli.test_bad_input import assert_one_line
from tests.cli.test_sample_and_evaluate import pixels
from tests.conftest import commands_in


class Named:
    """A text encoder's description."""

    def __init__(self, name):
        self.name = name

    def describe(self):
        return self.name


SMALL = (
    "logger=csv",
    "trainer=cpu",
    "callbacks=none",
    "metrics=none",
    "batch_size=32",
    "model.base_channels=16",
)
RUNS = {
    "plain": ["trainer.max_steps=6", "schedule=linear"],
    "less_trained": ["trainer.max_steps=2", "schedule=linear", "parameterization=v"],
    "conditional": [
        "trainer.max_steps=2",
        "schedule=linear",
        "conditioning=class",
        "conditioning.dropout=0.5",
    ],
    "classifier": [
        "experiment=classifier_digits",
        "trainer.max_steps=6",
        "schedule=linear",
        "validate_every=3",
    ],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short runs by name."""
    tmp_path = tmp_path_factory.mktemp("guidance")
    with pytest.MonkeyPatch.context() as patch:
        call = commands_in(tmp_path, patch)
        for name, overrides in RUNS.items():
            assert call("train", *SMALL, *overrides, f"hydra.run.dir={tmp_path / name}") == 0
    return {name: tmp_path / name for name in RUNS}


def sampled(command, tmp_path, run, *overrides, n=3):
    """The recipe's record and the images of a sampling run."""
    out = tmp_path / "out"
    assert command("sample", f"run={run}", f"n={n}", "sampler.steps=5", *overrides, f"out={out}") == 0
    return json.loads((out / "recipe.json").read_text()), pixels(out)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_weaker_run_guides(command, runs, tmp_path, sampler):
    choice = ["guidance=auto", f"guidance.run={runs['less_trained']}", f"sampler={sampler}"]
    recipe, images = sampled(command, tmp_path, runs["plain"], *choice, "guidance.scale=3")
    (weak,) = (runs["less_trained"] / "checkpoints").glob("*.ckpt")
    assert f"run(checkpoint={file_sha256(weak)[:16]}, training_steps=2, weights='ema')" in recipe["guidance"]
    assert recipe["network_evaluations"] == 10
    assert images.shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("run", "sampler"),
    [
        ("plain", "ddim"),
        ("plain", "ddpm"),
        ("conditional", "ddim"),
    ],
)
def test_a_classifier_guides(command, runs, tmp_path, run, sampler):
    choice = ["guidance=classifier", f"guidance.run={runs['classifier']}", f"sampler={sampler}"]
    recipe, images = sampled(command, tmp_path, runs[run], *choice, "guidance.scale=500")
    assert recipe["network_evaluations"] == 10
    assert recipe["labels"] == "image i has label i mod 10"
    assert "ClassifierGuidance(scale=500" in recipe["guidance"]
    assert images.shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("task", "method", "order"),
    [
        ("draw", None, [StaticClipping, ClassifierGuidance]),
        ("inpaint", None, [StaticClipping, ClassifierGuidance]),  # RePaint
        ("inpaint", "dps", [ClassifierGuidance, StaticClipping]),
        ("inpaint", "ddnm", [ClassifierGuidance, StaticClipping]),
    ],
)
def test_a_classifier_is_outside_of_clipping_only_where_it_moves_the_mean(command, runs, task, method, order):
    choice = [f"run={runs['plain']}", "guidance=classifier", f"guidance.run={runs['classifier']}"]
    choice += ["sampler=ddpm", f"task={task}", *([f"restoration={method}"] if method else [])]
    loaded, _ = load_with(composition("sample", choice))
    assert [kind_of(wrap) for wrap in loaded.recipe.wrappers] == order


def test_a_scale_alone_reports_that_it_replaces_the_run_s_guidance(command, tmp_path, capsys):
    options = ["trainer.max_steps=1", "conditioning=class", "conditioning.dropout=0.5"]
    for guidance in ("interval", "classifier_free"):
        run = tmp_path / guidance
        assert command("train", *SMALL, *options, f"guidance={guidance}", f"hydra.run.dir={run}") == 0
        capsys.readouterr()
        sampled(command, tmp_path, run, "guidance.scale=4")
        lines = [line for line in capsys.readouterr().out.splitlines() if "replaces this run's own" in line]
        assert len(lines) == (guidance == "interval")
        assert all("ClassifierFree(scale=4" in line and "interval=[0.2, 5.0]" in line for line in lines)


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (LowResolution(2), LowResolution(4), ["image (2 times smaller)", "image (4 times smaller)"]),
        (ByText(Named("a")), ByText(Named("b")), ["tokens (a)", "tokens (b)"]),
        (ByClass(3), ByClass(4), ["labels (3 classes)", "labels (4 classes)"]),
    ],
    ids=["factors", "encoders", "classes"],
)
def test_both_runs_read_the_same(theirs, ours, words):
    parts = Restored(None, None, theirs, None)
    with pytest.raises(ValueError, match="conditioned on") as error:
        check_classes(parts, ours)
    assert all(word in str(error.value) for word in words)
    check_classes(parts, theirs)


def test_another_codec_is_named():
    class Halves(Pixels):
        def describe(self):
            return "halves"

    denoiser = Denoiser(torch.nn.Identity(), Cosine(), V())
    with pytest.raises(ValueError, match=r"codec is Halves \(halves\), and this run's is Pixels"):
        check_fit(Restored(None, Halves((1, 8, 8)), None, denoiser), denoiser, Pixels((1, 8, 8)))


def test_momentum_depends_on_no_other_image(command, runs, tmp_path):
    choice = ["guidance=projected", "guidance.threshold=2"]
    recipe, images = sampled(command, tmp_path, runs["conditional"], *choice, n=5)
    assert recipe["network_evaluations"] == 10
    _, in_parts = sampled(command, tmp_path, runs["conditional"], *choice, "batch_size=2", n=5)
    assert (images == in_parts).mean() > 0.99


def test_guidance_in_training_and_evaluation(command, runs, tmp_path):
    assert (
        command(
            "train",
            "debug=quick",
            "logger=csv",
            "trainer=cpu",
            "model.base_channels=16",
            "batch_size=32",
            "schedule=linear",
            "guidance=auto",
            f"guidance.run={runs['less_trained']}",
            "guidance.interval=[0.1,2]",
            "guidance.rescale=0.5",
            f"hydra.run.dir={tmp_path}/run",
        )
        == 0
    )
    recipe = Record.read(tmp_path / "run" / "scores.json").protocol["recipe"]
    assert (
        "AutoGuidance(scale=2.0, interval=[0.1, 2], rescale=0.5, weak=run(checkpoint=" in recipe["guidance"]
    )
    assert recipe["steps"] < recipe["network_evaluations"] < 2 * recipe["steps"]
    assert list((tmp_path / "run" / "samples").glob("step_*.png"))
    # the run's guidance is the default
    assert command("evaluate", f"run={tmp_path}/run", "n=100", "sampler.steps=5") == 0
    (path,) = (tmp_path / "run" / "scores").glob("*/scores.json")
    assert Record.read(path).protocol["recipe"]["guidance"] == recipe["guidance"]


def test_a_classifier_resumes_and_reports_accuracy(command, runs, tmp_path):
    run = runs["classifier"]
    scores = Record.read(run / "scores.json").scores
    names = {"val/accuracy", *(f"val/accuracy_q{quarter}" for quarter in range(4))}
    assert names | {"val/loss", "val/loss_ema"} == set(scores)
    assert all(0 <= scores[name] <= 1 for name in names)
    quarters = [scores[f"val/accuracy_q{quarter}"] for quarter in range(4)]
    assert min(quarters) <= scores["val/accuracy"] <= max(quarters)
    # interrupted after three steps
    shorter = ["trainer.max_steps=3" if o.startswith("trainer.max_steps") else o for o in RUNS["classifier"]]
    assert command("train", *SMALL, *shorter, f"hydra.run.dir={tmp_path}/run") == 0
    assert command("train", f"ckpt={tmp_path}/run", "trainer.max_steps=6") == 0
    resumed, whole = (
        torch.load(folder / "checkpoints" / "step_00000006.ckpt", weights_only=True)
        for folder in (tmp_path / "run", run)
    )
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, resumed["state_dict"][name]), name
    for name, average in whole["callbacks"]["EMA"]["weights"].items():
        assert torch.equal(average, resumed["callbacks"]["EMA"]["weights"][name]), name


BAD = {
    "a classifier as the weak run": (
        ["run={plain}", "guidance=auto", "guidance.run={classifier}"],
        ["guidance.run=", "is a classifier", "guidance=classifier"],
    ),
    "no classifier": (
        ["run={plain}", "guidance=classifier", "guidance.run={less_trained}"],
        ["guidance.run=", "no classifier", "experiment=classifier_digits"],
    ),
    "another schedule": (
        ["schedule=linear", "schedule.T=500", "guidance=auto", "guidance.run={plain}"],
        ["guidance.run=", "Linear", "same schedule"],
    ),
    "another shape": (
        ["data=fashion_mnist", "schedule=linear", "guidance=auto", "guidance.run={plain}"],
        ["guidance.run=", "1 x 8 x 8", "1 x 28 x 28"],
    ),
    "a conditional weak run": (
        ["run={plain}", "guidance=auto", "guidance.run={conditional}"],
        ["guidance.run=", "conditional", "conditioning=none"],
    ),
    "a classifier's images": (["run={classifier}"], ["run=", "is a classifier", "guidance=classifier"]),
    "an unknown length of the average": (
        ["run={plain}", "guidance=auto", "guidance.run={plain}", "guidance.weights=best"],
        ["guidance.weights='best'"],
    ),
    "labels that nothing reads": (
        ["run={plain}", "guidance=auto", "guidance.run={less_trained}", "labels=3"],
        ["labels=3", "not conditioned on classes"],
    ),
    "a scale that is no number": (
        ["run={plain}", "guidance=auto", "guidance.run={less_trained}", "guidance.scale=nan"],
        ["guidance.scale must be finite"],
    ),
    "a momentum along repeated steps": (
        ["run={conditional}", "guidance=projected", "task=inpaint"],
        ["guidance.momentum=-0.5", "restoration=repaint", "guidance.momentum=0"],
    ),
    "classes of an unconditional network": (
        ["run={plain}", "guidance=classifier_free"],
        ["guidance", "no condition"],
    ),
    "a scale alone is classifier-free guidance": (
        ["run={plain}", "guidance.scale=2"],
        ["guidance", "no condition"],
    ),
    "a scale below 0": (
        ["run={plain}", "guidance=auto", "guidance.run={plain}", "guidance.scale=-1"],
        ["guidance.scale must be at least 0, got -1"],
    ),
    "reconstruction": (
        ["run={conditional}", "guidance=classifier_free", "task=reconstruct"],
        ["task=reconstruct", "guidance=none"],
    ),
    "a likelihood": (
        ["run={plain}", "guidance=auto", "guidance.run={less_trained}", "metrics=nll", "n=2"],
        ["metrics", "guidance=none"],
    ),
    "a classifier's score": (["run={classifier}", "metrics=fd_digits"], ["run=", "is a classifier"]),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_in_one_line(command, capsys, runs, case):
    overrides, words = BAD[case]
    name = "evaluate" if any(override.startswith("metrics") for override in overrides) else "sample"
    if not overrides[0].startswith("run="):
        name, overrides = "train", ["logger=csv", "metrics=none", *overrides]
    assert command(name, *(override.format(**runs) for override in overrides)) == 2
    assert_one_line(capsys.readouterr().err, words)

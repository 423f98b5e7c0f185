"""src.sample and src.evaluate: their output, and that an image does not depend on the other images of its batch."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from src.evaluation.record import Record
from tests.cli.test_bad_input import assert_one_line
from tests.conftest import QUICK, commands_in


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run, shared by all tests of this file."""
    tmp_path = tmp_path_factory.mktemp("loaded")
    with pytest.MonkeyPatch.context() as patch:
        assert commands_in(tmp_path, patch)("train", *QUICK, "ema.decay=0.9") == 0
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "images").iterdir())])


def test_pictures(command, run, tmp_path):
    assert (
        command("sample", f"run={run}", "n=6", "sampler.steps=4", "task.gif=true", f"out={tmp_path}/out") == 0
    )
    assert pixels(tmp_path / "out").shape == (6, 8, 8)
    assert Image.open(tmp_path / "out" / "grid.png").width >= 256
    assert Image.open(tmp_path / "out" / "denoising.gif").n_frames == 5
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["network_evaluations"] == 4
    assert recipe["weights"] == "ema"


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_image_depends_only_on_seed_and_index(command, run, tmp_path, sampler):
    base = [f"run={run}", f"sampler={sampler}", "sampler.steps=5"]
    assert command("sample", *base, "n=7", f"out={tmp_path}/whole") == 0
    assert command("sample", *base, "n=5", "batch_size=2", f"out={tmp_path}/parts") == 0
    assert command("sample", *base, "n=5", "seed=1", f"out={tmp_path}/other") == 0
    whole, parts, other = (pixels(tmp_path / name) for name in ("whole", "parts", "other"))
    # rounding differs between batch sizes, so bytes can rarely differ by one
    assert (whole[:5] == parts).mean() > 0.99
    assert (whole[:5] == other).mean() < 0.9


def test_averaged_and_raw_weights_differ(command, run, tmp_path):
    for weights in ("ema", "raw"):
        assert command("sample", f"run={run}", "n=4", f"weights={weights}", f"out={tmp_path}/{weights}") == 0
    assert (pixels(tmp_path / "ema") != pixels(tmp_path / "raw")).any()


def test_checkpoint_file_is_sufficient(command, run, tmp_path):
    shutil.copy(run / "checkpoints" / "step_00000020.ckpt", tmp_path / "lone.ckpt")
    assert command("sample", "run=lone.ckpt", "n=3", "sampler.steps=4", f"out={tmp_path}/lone") == 0
    assert command("sample", f"run={run}", "n=3", "sampler.steps=4", f"out={tmp_path}/run") == 0
    assert (pixels(tmp_path / "lone") == pixels(tmp_path / "run")).all()


def test_scores_and_protocol(command, run, capsys):
    assert (
        command("evaluate", f"run={run}", "n=100", "sampler.steps=3", "sampler.eta=0.5", "spacing=leading")
        == 0
    )
    (path,) = (run / "scores").glob("*/scores.json")
    record = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert Record.read(path).printed("fd_digits") in printed
    low, high = record["intervals"]["fd_digits"]
    assert low < record["scores"]["fd_digits"] < high
    assert re.search(r"evaluations +3 of the network", printed)
    protocol = record["protocol"]
    assert protocol["num_images"] == 100
    assert protocol["recipe"] == {
        "training_steps": 20,
        "weights": "ema",
        "ema_decay": 0.9,
        "sampler": "DDIM(eta=0.5)",
        "spacing": "Leading()",
        "variance": "Small()",
        "guidance": "none",
        "clipping": "StaticClipping(bound=1.0)",
        "labels": "none",
        "steps": 3,
        "network_evaluations": 3,
        "seed": 0,
    }


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_images_in_bfloat16_are_near_those_in_float32_and_recorded(command, run, tmp_path, precision):
    base = [f"run={run}", "n=4", "sampler.steps=4"]
    assert command("sample", *base, f"out={tmp_path}/plain") == 0
    assert command("sample", *base, f"precision={precision}", f"out={tmp_path}/fast") == 0
    plain, fast = (pixels(tmp_path / name).astype(float) for name in ("plain", "fast"))
    assert np.abs(plain - fast).mean() < 2
    assert json.loads((tmp_path / "fast" / "recipe.json").read_text())["precision"] == precision
    assert "precision" not in json.loads((tmp_path / "plain" / "recipe.json").read_text())


@pytest.mark.slow
def test_a_compiled_network_makes_the_same_images(command, run, tmp_path):
    base = [f"run={run}", "n=5", "batch_size=4", "sampler.steps=4"]
    assert command("sample", *base, f"out={tmp_path}/plain") == 0
    assert command("sample", *base, "compile=true", f"out={tmp_path}/fast") == 0
    plain, fast = (pixels(tmp_path / name).astype(float) for name in ("plain", "fast"))
    assert np.abs(plain - fast).max() <= 1
    assert json.loads((tmp_path / "fast" / "recipe.json").read_text())["compiled"] is True


def test_previews_equal_sampled_images(command, run, tmp_path):
    """The grid of the callback and that of src.sample show the same images."""
    assert command("sample", f"run={run}", "n=16", "sampler.steps=5", f"out={tmp_path}/again") == 0
    preview = np.asarray(Image.open(run / "samples" / "step_00000020.png").convert("L"))
    assert (preview == np.asarray(Image.open(tmp_path / "again" / "grid.png").convert("L"))).mean() > 0.99


def test_sampling_sweep(command, run, tmp_path):
    assert command("evaluate", "-m", f"run={run}", "n=50", "sampler.steps=2,3", "sampler.eta=0,1") == 0
    (sweep,) = (tmp_path / "runs" / "sweeps").iterdir()
    outcomes = json.loads((sweep / "sweep.json").read_text())
    assert len(outcomes) == 4
    assert all("fd_digits" in outcome["scores"] for outcome in outcomes.values())


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_unbounded_errors_are_warned_about(command, run, capsys, name):
    warning = "clipping=none: the first step of sampling multiplies the network's errors by 20,291"
    for clipping in ("static", "none"):
        assert command(name, f"run={run}", "n=2", "sampler.steps=2", f"clipping={clipping}") == 0
        assert (warning in capsys.readouterr().out) == (clipping == "none")


@pytest.mark.parametrize(
    ("arguments", "warned"),
    [
        (["sample", "task=draw"], True),
        (["sample", "task=interpolate"], True),
        (["sample", "task=img2img"], False),
        (["sample", "task=reconstruct"], False),
        (["evaluate"], True),
    ],
)
def test_start_without_signal_is_warned_about(command, run, capsys, arguments, warned):
    recipe = ["spacing=leading", "sampler.steps=4", "n=2"]
    assert command(*arguments, f"run={run}", *recipe) == 0
    assert ("sampling starts from noise alone at t = 751 of 1000" in capsys.readouterr().out) == warned


@pytest.mark.parametrize(
    ("task", "evaluations"),
    # reconstruct: encoding takes as many evaluations as decoding; img2img: strength 0.5 takes half of the steps
    [
        ("trajectory", 6),
        ("interpolate", 6),
        ("reconstruct", 12),
        ("img2img", 3),
        ("deblur", 6),
        ("upsample", 6),
    ],
)
def test_tasks(command, run, tmp_path, capsys, task, evaluations):
    assert (
        command("sample", f"run={run}", f"task={task}", "n=3", "sampler.steps=6", f"out={tmp_path}/out") == 0
    )
    assert f"evaluations {evaluations} of the network" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "grid.png").width >= 256
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["network_evaluations"] == evaluations


def test_inpainting_of_files(command, run, tmp_path):
    """The known pixels of the written images are the bytes of the files."""
    (tmp_path / "files").mkdir()
    source = np.random.default_rng(0).integers(0, 256, (2, 8, 8), dtype=np.uint8)
    for name, image in zip("ab", source, strict=True):
        Image.fromarray(image).save(tmp_path / "files" / f"{name}.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 5:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    given = [f"task.images={tmp_path}/files", f"task.mask={tmp_path}/mask.png", f"out={tmp_path}/out"]
    few = ["sampler.steps=4", "restoration=repaint", "restoration.jump_length=1", "restoration.n_resample=2"]
    assert command("sample", f"run={run}", "task=inpaint", *given, *few) == 0
    found = pixels(tmp_path / "out")
    assert (found[..., :5] == source[..., :5]).all()
    assert (found[..., 5:] != source[..., 5:]).any()
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert "restoration=RePaint(jump_length=1, n_resample=2)" in recipe["task"]
    assert recipe["network_evaluations"] == 4 + 3
    assert {len(recipe["inputs"]["sha256"]), len(recipe["inputs"]["mask"]["sha256"])} == {64}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task=inpaint", "task.images=none.png"], ["task.images=none.png: no such file or folder"]),
        (["task=inpaint", "task.maks=box"], ["task.maks", "did you mean task.mask"]),
        (
            ["task=inpaint", "sampler.steps=5", "restoration=repaint", "restoration.jump_length=5"],
            ["restoration.jump_length=5", "restoration=repaint restoration.jump_length=2,"],
        ),
        (["task=inpaint", "restoration.jump_length=2"], ["choose restoration=repaint too", "the task's"]),
        (["restoration.scale=2"], ["restoration.scale: choose restoration=dps too"]),
        (
            ["task=inpaint", "labels=3"],
            ["labels=3: Inpaint", "leave labels out, or give files in task.images"],
        ),
        (["task=upsample", "prompts=[a]"], ["prompts=['a']: Upsample", "leave prompts out, or give files"]),
        (["task=reconstruct", "prompts=a"], ["prompts=a: Reconstruct", "leave prompts out"]),
        (
            ["task=inpaint", "restoration=dps", "restoration.scale=-1"],
            ["restoration.scale must be at least 0"],
        ),
        (["task=inpaint", "sampler=dpmpp_2m"], ["sampler must be a single-step method"]),
        (["task=upsample", "task.factor=3"], ["task.factor=3 must divide"]),
        (["task=deblur", "restoration=repaint"], ["RePaint does not support this measurement"]),
        (["task=superres"], ["conditioning=low_resolution"]),
        (["restoration=dps"], ["restoration has no effect on Draw"]),
    ],
    ids=" ".join,
)
def test_mistakes_of_restorations_are_one_line(command, run, capsys, overrides, words):
    assert command("sample", f"run={run}", "n=2", *overrides) == 2
    assert_one_line(capsys.readouterr().err, words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task.mask=none.png"], ["task.mask=none.png: no such file"]),
        (["task.share=0"], ["task.share must be in (0, 1]"]),
        (["task.images=none.png"], ["task.images=none.png: no such file"]),
        (["sampler.steps=1"], ["sampler.steps=1: RePaint needs at least 2 steps"]),
        (["restoration=dps", "restoration.scale=-1"], ["restoration.scale must be at least 0"]),
    ],
    ids=" ".join,
)
def test_options_are_checked_before_the_run_is_loaded(command, capsys, overrides, words):
    assert command("sample", "run=runs/none", "task=inpaint", *overrides) == 2
    assert_one_line(capsys.readouterr().err, words)


def test_the_size_of_a_mask_is_checked_before_the_data_are_read(command, run, capsys, tmp_path, monkeypatch):
    def unread(*_):
        raise AssertionError("the data are read")

    monkeypatch.setattr("src.data.digits.Digits.split", unread)
    Image.fromarray(np.full((4, 4), 255, np.uint8)).save(tmp_path / "mask.png")
    assert command("sample", f"run={run}", "task=inpaint", f"task.mask={tmp_path}/mask.png") == 2
    assert_one_line(capsys.readouterr().err, ["4 x 4 pixels and must have 8 x 8"])


def test_inpainting_with_few_steps_records_its_jumps(command, run, tmp_path):
    options = ["task=inpaint", "sampler.steps=5", "n=2", f"out={tmp_path}/out"]
    assert command("sample", f"run={run}", *options) == 0
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert "restoration=RePaint(jump_length=2, n_resample=10)" in recipe["task"]
    assert recipe["labels"] == "none"


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_rows_of_an_interpolation_end_in_drawn_images(command, run, tmp_path, sampler):
    overrides = [f"run={run}", f"sampler={sampler}", "sampler.steps=4"]
    assert command("sample", *overrides, "n=2", f"out={tmp_path}/drawn") == 0
    assert (
        command("sample", *overrides, "task=interpolate", "task.columns=2", "n=1", f"out={tmp_path}/between")
        == 0
    )
    drawn = pixels(tmp_path / "drawn")
    row = np.asarray(Image.open(tmp_path / "between" / "grid.png").convert("L"))
    factor = row.shape[1] // 19  # width: two images of 8 pixels and three gaps
    row = row[factor // 2 :: factor, factor // 2 :: factor]
    assert (np.abs(row[1:9, 1:9].astype(int) - drawn[0]) <= 1).all()
    assert (np.abs(row[1:9, 10:18].astype(int) - drawn[1]) <= 1).all()


def test_trajectory_of_the_adaptive_solver(command, run, tmp_path):
    overrides = ["sampler=dopri5", "sampler.steps=3", "sampler.tolerance=0.01"]
    assert command("sample", f"run={run}", "task=trajectory", *overrides, "n=2", f"out={tmp_path}/out") == 0


@pytest.mark.parametrize(
    "overrides",
    [
        ["sampler.eta=1"],
        ["sampler=dpmpp_2m"],
        ["sampler=dpm_solver_2"],
        ["sampler=heun"],
        ["sampler=euler", "sampler.s_churn=1"],
    ],
    ids=" ".join,
)
def test_reconstruction_refuses_samplers_without_inversion(command, run, capsys, overrides):
    assert command("sample", f"run={run}", "task=reconstruct", *overrides) == 2
    assert_one_line(capsys.readouterr().err, ["DDIM inversion", "sampler.eta=0"])


def test_euler_without_churn_reconstructs_as_ddim_does(command, run, tmp_path):
    for sampler in ("ddim", "euler"):
        overrides = [f"sampler={sampler}", "sampler.steps=4", "n=2", f"out={tmp_path}/{sampler}"]
        assert command("sample", f"run={run}", "task=reconstruct", *overrides) == 0
    ddim, euler = (np.asarray(Image.open(tmp_path / name / "grid.png")) for name in ("ddim", "euler"))
    assert (ddim == euler).all()


def test_inversion_without_convergence_is_an_error(command, run, capsys):
    overrides = [f"run={run}", "task=reconstruct", "n=2", "sampler.steps=8", "task.tolerance=1e-9"]
    assert command("sample", *overrides) == 2
    assert "task.tolerance" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("clipping.bound=0", ["error: clipping.bound must be positive"]),
        ("variance=learned", ["error: variance: Learned()", "with Small()", "variance=small"]),
        ("variance=learned_range", ["error: variance: LearnedRange()", "with Small()"]),
        ("task.strength=0", ["error: task.strength must be in"]),
    ],
)
def test_error_names_the_wrong_option(command, run, capsys, override, words):
    assert command("sample", f"run={run}", "task=img2img", override) == 2
    assert_one_line(capsys.readouterr().err, words)


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_a_misspelt_option_is_named(command, run, capsys, name):
    assert command(name, f"run={run}", "sampler.stepz=3") == 2
    assert_one_line(capsys.readouterr().err, ["sampler.stepz", "did you mean sampler.steps"])


def test_sections_as_documented(command, run, tmp_path):
    sections = ["spacing=sections", 'spacing.sections="1,2,3"', "sampler.steps=6"]
    assert command("sample", f"run={run}", *sections, "n=2", f"out={tmp_path}/out") == 0


@pytest.mark.parametrize(
    "other",
    [
        "variance=large",
        "spacing=leading",
        "clipping=none",
        "sampler.steps=4",
        "seed=1",
        "weights=raw",
        "n=60",
    ],
)
def test_each_choice_has_a_separate_record(command, run, other):
    """The scores of one choice do not overwrite those of another."""
    scores = run / "scores"
    base = ["evaluate", f"run={run}", "sampler=ddpm", "sampler.steps=3"]
    assert command(*base, "n=50") == 0
    before = set(scores.iterdir())
    assert command(*base, *([] if other.startswith("n=") else ["n=50"]), other) == 0
    assert len(set(scores.iterdir()) - before) == 1

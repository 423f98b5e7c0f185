"""`src.export`: what other libraries make of a run is what the run makes; and back by `src.import_weights`."""

import json
import shutil
import subprocess
import sys

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from src.app import export
from src.app.load import load_with
from src.conditioning import Condition
from src.diffusion.sampler import ReplayedNoise
from tests.cli.test_training import checkpoint
from tests.conftest import QUICK, commands_in
from tests.interop.test_published import edm_skeleton
from tests.test_conf import composed

PREFIX = "loss.denoiser.network."


def trained(tmp_path_factory, *options):
    """A run whose weights are random, also those that start at zero."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        overrides = [*QUICK, "metrics=none", "ema=none", "optimizer.lr=0.02", "trainer.max_steps=4", *options]
        assert commands_in(folder, patch)("train", *overrides, "hydra.run.dir=run") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory, "schedule=linear")


@pytest.fixture(scope="module")
def by_class(tmp_path_factory):
    return trained(tmp_path_factory, "conditioning=class", "parameterization=v")


def loaded(run, *options):
    return load_with(composed("sample", f"run={run}", "device=cpu", *options))[0]


def assert_same_pixels(theirs, ours):
    """Bytes of a pipeline's images in [0, 1], (B, H, W, C), and of a codec."""
    bytes_of = torch.from_numpy(theirs).permute(0, 3, 1, 2).mul(255).round().to(torch.uint8)
    assert bytes_of.float().std() > 5
    # rounding differs where a value lies between two bytes: diffusers' tables are float32
    difference = (bytes_of.int() - ours.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


def run_card(folder, **names):
    """Runs the code of a model card, and returns its names."""
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    exec(code, names)
    return names


def test_ddim_pipeline_makes_the_same_pixels_from_the_same_noise(run, command, tmp_path):
    out = tmp_path / "out"
    assert command("export", f"run={run}", f"out={out}", "sampler.steps=10") == 0
    pipeline = diffusers.DDIMPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        batch_size=4,
        num_inference_steps=10,
        use_clipped_model_output=True,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    made = loaded(run, "sampler.steps=10")
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    denoiser, recipe = made.recipe.around(made.denoiser), made.recipe
    with torch.no_grad():
        x = recipe.sampler(denoiser, noise, recipe.times(made.denoiser.schedule))
    assert_same_pixels(theirs, recipe.codec.decode(x))
    card = (out / "README.md").read_text()
    assert all(
        words in card
        for words in ("library_name: diffusers", "checkpoint_sha256", '"steps": 10', "DDIM(eta=0.0)")
    )
    assert not list(out.rglob("*.bin"))


def test_ddpm_pipeline_makes_the_same_pixels_from_the_same_noise(run, command, tmp_path):
    out = tmp_path / "out"
    options = ("sampler=ddpm", "sampler.steps=20", "variance=large", "spacing=leading")
    assert command("export", f"run={run}", f"out={out}", *options) == 0
    pipeline = diffusers.DDPMPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(0)
    theirs = pipeline(batch_size=4, num_inference_steps=20, generator=draw, output_type="np").images
    draw = torch.Generator().manual_seed(0)
    noise = [torch.randn(4, 1, 8, 8, generator=draw) for _ in range(20)]
    made = loaded(run, *options)
    denoiser, recipe = made.recipe.around(made.denoiser), made.recipe
    with torch.no_grad():
        x = recipe.sampler(
            denoiser, noise[0], recipe.times(made.denoiser.schedule), noise=ReplayedNoise(noise[1:])
        )
    assert_same_pixels(theirs, recipe.codec.decode(x))


@pytest.mark.parametrize("kind", ["run", "by_class"])
def test_comes_back_bit_for_bit(kind, command, tmp_path, request):
    run, out, back = request.getfixturevalue(kind), tmp_path / "out", tmp_path / "back"
    assert command("export", f"run={run}", f"out={out}") == 0
    assert command("import_weights", f"source={out}", f"out={back}", "data=digits", "step=4") == 0
    before, after = checkpoint(run, 4), checkpoint(back, 4)
    weights = {name: w for name, w in before["state_dict"].items() if name.startswith(PREFIX)}
    assert weights.keys() == after["state_dict"].keys()
    assert all(torch.equal(weight, after["state_dict"][name]) for name, weight in weights.items())
    for group in ("schedule", "parameterization", "variance", "conditioning"):
        ours, theirs = ((content["config"][group] or {}).get("_target_") for content in (before, after))
        assert ours == theirs
    # and is then sampled and fine-tuned like any other
    assert command("sample", f"run={back}", "n=4", "sampler.steps=2", "out=pictures") == 0
    assert json.loads((tmp_path / "pictures/recipe.json").read_text())["weights"] == "imported"
    conditioned = ["conditioning=class", "parameterization=v"] if kind == "by_class" else ["schedule=linear"]
    quick = [*QUICK, "metrics=none", "trainer.max_steps=1", *conditioned]
    assert command("train", *quick, f"init={back}", "hydra.run.dir=tuned") == 0


@pytest.mark.parametrize("options", [["sampler.steps=10"], ["sampler=ddpm", "sampler.steps=10"]])
def test_loop_of_a_class_conditional_card_makes_the_same_pixels(by_class, command, tmp_path, capsys, options):
    options = [*options, "spacing=leading", "clipping=static"]
    assert command("export", f"run={by_class}", "out=out", *options) == 0
    assert "pass no classes" in capsys.readouterr().out
    torch.manual_seed(0)
    names = run_card(tmp_path / "out")
    made = loaded(by_class, *options)
    denoiser, recipe = made.recipe.around(made.denoiser), made.recipe
    draw = torch.Generator().manual_seed(0)
    noise = [torch.randn(4, 1, 8, 8, generator=draw) for _ in range(10)]
    with torch.no_grad():
        x = recipe.sampler(
            denoiser,
            noise[0],
            recipe.times(made.denoiser.schedule),
            condition=Condition(labels=names["classes"]),
            noise=ReplayedNoise(noise[1:]),
        )
    theirs = names["x"].add(1).div(2).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert_same_pixels(theirs, recipe.codec.decode(x))


@torch.no_grad()
def inputs_and_output(run):
    """Inputs of a network of ten classes by name, and its output."""
    inputs = {
        "x": torch.randn(5, 1, 8, 8),
        "label": torch.linspace(0, 999, 5),
        "classes": torch.tensor([0, 3, -1, 9, -1]),
    }
    x, label, classes = inputs.values()
    return inputs, loaded(run).denoiser.network(x, label, Condition(labels=classes))


@pytest.mark.slow
def test_torch_program_is_loaded_without_this_framework(by_class, command, tmp_path):
    assert command("export", f"run={by_class}", "format=torch", "out=out") == 0
    inputs, expected = inputs_and_output(by_class)
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        "import sys, torch; p = torch.export.load('out/network.pt2').module();"
        "torch.save(p(**torch.load('inputs.pt')), 'output.pt'); assert 'src' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run_card(tmp_path / "out", **inputs)["output"], expected, rtol=1e-5, atol=1e-5)
    card = (tmp_path / "out/README.md").read_text()
    assert "-1 for no class" in card
    assert "c_skip" in card


def test_a_failed_check_leaves_nothing(run, command, tmp_path, monkeypatch, capsys):
    def write(network, labels, folder):
        (folder / "network.pt2").touch()
        return difference

    monkeypatch.setattr(export.programs, "write_program", write)
    before, difference = set(tmp_path.iterdir()), 0.1
    assert command("export", f"run={run}", "format=torch", "out=out") == 2
    assert "differs from the run's by 1.0e-01" in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before
    difference = 0.0
    (tmp_path / "empty").mkdir()
    for out in ("out", "empty"):
        assert command("export", f"run={run}", "format=torch", f"out={out}") == 0
        assert {path.name for path in (tmp_path / out).iterdir()} == {"network.pt2", "README.md"}
        assert f'load("{out}/network.pt2")' in (tmp_path / out / "README.md").read_text()
    assert set(tmp_path.iterdir()) - before == {tmp_path / "out", tmp_path / "empty"}


@pytest.mark.slow
def test_onnx_model_equals_the_network(by_class, command, tmp_path, capsys):
    assert command("export", f"run={by_class}", "format=onnx", "out=out") == 0
    assert "relative difference" in capsys.readouterr().out
    inputs, expected = inputs_and_output(by_class)
    names = run_card(tmp_path / "out", **{name: tensor.numpy() for name, tensor in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(names["output"]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["sampler=heun"], "sampler: Heun has no counterpart; choose ddim, ddpm"),
        (["spacing=karras"], "spacing: Karras has no counterpart"),
        (["clipping=dynamic"], "clipping=static or none"),
        (["format=pickle"], "format='pickle'"),
        (["out=."], "not empty"),
    ],
)
def test_refusals_are_one_line(run, command, capsys, tmp_path, options, words):
    (tmp_path / "file").touch()
    out = [] if "out=." in options else ["out=out"]
    assert command("export", f"run={run}", *out, *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "out").exists()


def test_import_of_a_folder_in_the_first_layout_and_refusals(run, command, capsys, tmp_path):
    """As google/ddpm-cifar10-32: all files side by side."""
    assert command("export", f"run={run}", "out=out") == 0
    flat, out = tmp_path / "flat", tmp_path / "out"
    flat.mkdir()
    for file in (*(out / "unet").iterdir(), *(out / "scheduler").iterdir(), out / "model_index.json"):
        shutil.copy(file, flat)
    assert command("import_weights", "source=flat", "out=flat_run", "data=digits") == 0

    def refused(words, *arguments):
        capsys.readouterr()
        assert command("import_weights", *arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error
        return error

    refused("holds a run already", "source=flat", "out=flat_run", "data=digits")
    refused("data is missing", "source=flat", "out=new")
    refused("source is missing", "out=new", "data=digits")
    refused("images of 1 channels", "source=flat", "out=new", "data=cifar10")
    config = json.loads((flat / "config.json").read_text())
    (flat / "config.json").write_text(json.dumps(config | {"freq_shift": 0}))
    refused("freq_shift=0", "source=flat", "out=new", "data=digits")
    (flat / "config.json").write_text(json.dumps(config))
    weights = flat / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), flat / "diffusion_pytorch_model.bin")
    weights.unlink()
    refused("diffusion_pytorch_model.bin is a pickle", "source=flat", "out=new", "data=digits")
    for name in ("network.pt", "network.pkl", "network.ckpt"):
        (tmp_path / name).touch()
        refused("docs/interop.md", f"source={name}", "out=new", "data=digits")
    assert not (tmp_path / "new").exists()
    assert command("train", "ckpt=flat_run", "trainer.max_steps=3") == 2
    assert "start with init=" in capsys.readouterr().err


def test_import_of_a_file_is_a_run_with_the_process_of_its_authors(command, tmp_path):
    save_file(edm_skeleton(adm=False, channels=1), tmp_path / "edm.safetensors")
    assert command("import_weights", "source=edm.safetensors", "out=run", "data=digits", "step=9") == 0
    assert (
        command(
            "sample", "run=run", "n=4", "sampler=heun", "spacing=karras", "sampler.steps=2", "out=pictures"
        )
        == 0
    )
    recipe = json.loads((tmp_path / "pictures/recipe.json").read_text())
    assert (recipe["training_steps"], recipe["weights"]) == (9, "imported")
    config = checkpoint(tmp_path / "run", 9)["config"]
    assert config["schedule"]["_target_"].endswith("EDM")
    assert config["parameterization"]["_target_"].endswith("EDM")
    assert (config["sampler"]["steps"], config["model"]["skip_scale"]) == (18, 0.5**0.5)

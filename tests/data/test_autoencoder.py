"""Latents of a tiny random AutoencoderKL: formulas, cache, and that a run is refused with another one."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from src.data.autoencoder import DEFAULTS, WEIGHTS, AutoencoderKL
from src.data.source import InMemoryImages
from src.data.stream import TrainingStream
from src.errors import UserError
from tests.cli.test_training import checkpoint
from tests.conftest import QUICK

diffusers = pytest.importorskip("diffusers")
FEW = (
    *QUICK,
    "metrics=none",
    "trainer.max_steps=2",
    "model.channel_multipliers=[1]",
    "model.attention_factors=[1]",
)


def blocks_of(levels):
    return {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }


def write_autoencoder(folder, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"block_out_channels": (8, 16), "latent_channels": 2, "norm_num_groups": 4, "layers_per_block": 1}
    blocks = blocks_of(2)
    options = {"in_channels": 1, "out_channels": 1, "sample_size": 8, "scaling_factor": 0.7} | sizes | blocks
    network = diffusers.AutoencoderKL(**options | changes)
    network.save_pretrained(folder, safe_serialization=True)
    return network.eval()


def codec(folder, tmp_path, **options):
    return AutoencoderKL((1, 8, 8), str(folder), cache=str(tmp_path / "cache"), **options)


def source_of(images):
    made = InMemoryImages(images, torch.arange(len(images)))
    return SimpleNamespace(
        split=lambda split: made, fingerprint=lambda split: made.fingerprint(), horizontal_flip=True
    )


@torch.no_grad()
def test_latents_by_the_formula_and_from_the_cache(tmp_path, monkeypatch):
    network = write_autoencoder(tmp_path / "vae")
    made = codec(tmp_path / "vae", tmp_path, batch=3)
    images = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    x = images.float() / 127.5 - 1
    mean = network.encode(x).latent_dist.mean
    assert made.shape == mean.shape[1:] == (2, 4, 4)
    torch.testing.assert_close(made.encode(images), 0.7 * mean)
    decoded = network.decode(mean).sample.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    assert (made.decode(made.encode(images)).int() - decoded.int()).abs().max() <= 1

    source = source_of(images)
    latents = made.encoded(source, "train")
    torch.testing.assert_close(latents.images([4, 1]), 0.7 * mean[[4, 1]])
    (file,) = (tmp_path / "cache").iterdir()
    again = codec(tmp_path / "vae", tmp_path)
    monkeypatch.setattr(type(again), "_all", None)  # nothing is encoded
    stream = TrainingStream(again.encoded(source, "train"), 0, 4, horizontal_flip=True)
    positions = torch.arange(7)
    batch = stream.__getitems__(positions)
    flips = stream.flips(positions)
    assert 0 < flips.sum() < 7
    chosen = images[stream.indices(positions)]
    chosen[flips] = chosen[flips].flip(-1)
    torch.testing.assert_close(made.encode(batch.images), made.encode(chosen))
    stored = load_file(file)
    torch.testing.assert_close(stored["mean"], (0.7 * mean).double().mean(dim=(0, 2, 3)))
    assert json.loads(bytes(stored["origin"].tolist())) == made.pinned()
    # another scale has other latents
    other = codec(tmp_path / "vae", tmp_path, scale=2.0)
    with pytest.raises(TypeError):
        other.encoded(source, "train")


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {"sha256": "0" * 64}, "is not that of the run's latents"),
        ({}, {"scale": 0.0}, "scale must be above 0"),
        ({"scaling_factor": float("nan")}, {}, "scale must be above 0"),
        ({"in_channels": 3}, {}, "takes images of 3 channels"),
        ({"block_out_channels": (8,) * 5}, {}, "divides sides by 16"),
    ],
)
def test_refusals(changes, options, words, tmp_path):
    if "block_out_channels" in changes:
        changes = changes | blocks_of(5)
    write_autoencoder(tmp_path / "vae", **changes)
    with pytest.raises((UserError, ValueError), match=words):
        codec(tmp_path / "vae", tmp_path, **options)


def test_missing_keys_have_the_defaults_of_diffusers(tmp_path):
    write_autoencoder(
        tmp_path / "vae",
        **{"in_channels": 3, "latent_channels": 4, "block_out_channels": (64,)},
        **blocks_of(1),
    )
    file = tmp_path / "vae/config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in stored.items() if key not in DEFAULTS}))
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").config
    made = AutoencoderKL((3, 8, 8), str(tmp_path / "vae"))
    assert (made.scale, made.shift) == (theirs.scaling_factor, theirs.shift_factor or 0)
    assert made.shape == (theirs.latent_channels, 8, 8)


def test_missing_weights_are_refused_and_a_wrong_scale_is_reported(tmp_path, caplog):
    write_autoencoder(tmp_path / "vae")
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    made = codec(tmp_path / "vae", tmp_path, scale=100.0)
    with caplog.at_level("WARNING"):
        spread = made.encoded(source_of(images), "train").latents.std(correction=0).item()
    assert f"choose codec.scale={100 / spread:.4g}" in caplog.text
    weights = load_file(made.folder / WEIGHTS)
    name = "decoder.conv_in.weight"
    del weights[name]
    save_file(weights, made.folder / WEIGHTS)
    with pytest.raises(UserError, match=f"does not fit config.json in 1 weights, e.g. {name}"):
        codec(tmp_path / "vae", tmp_path).decode(torch.zeros(1, 2, 4, 4))


def test_run_in_latents_is_sampled_with_its_own_autoencoder_only(command, only_run, tmp_path, capsys):
    write_autoencoder(tmp_path / "vae")
    cache = f"codec.cache={tmp_path / 'latents'}"
    latent = ("codec=autoencoder_kl", "codec.folder=vae", cache, "model.blocks_per_level=1")
    assert command("train", *FEW, *latent) == 0
    run, stored = only_run(), checkpoint(only_run(), 2)["config"]["codec"]
    assert len(stored["sha256"]) == 64
    assert stored["scale"] == 0.7
    sample = ("sample", f"run={run}", "n=4", "sampler.steps=2")
    assert command(*sample, "out=first") == 0
    recipe = json.loads((tmp_path / "first/recipe.json").read_text())
    assert recipe["clipping"] == "none"
    assert (tmp_path / "latents").is_dir()

    def refused(words, *arguments):
        capsys.readouterr()
        assert command(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert words in error

    shutil.move(tmp_path / "vae", tmp_path / "moved")
    refused("codec.folder=vae", *sample, "out=second")
    assert command(*sample, "out=second", "codec.folder=moved") == 0
    assert (tmp_path / "first/grid.png").read_bytes() == (tmp_path / "second/grid.png").read_bytes()
    assert command("train", f"ckpt={run}", "codec.folder=moved", cache, "trainer.max_steps=3") == 0
    refused(
        "codec.scale", "train", f"ckpt={run}", "codec.folder=moved", "codec.scale=2.0", "trainer.max_steps=4"
    )
    refused("this run has latents", "evaluate", f"run={run}", "metrics=nll", "codec.folder=moved")
    # another decoder, and the same with another scale in its configuration
    write_autoencoder(tmp_path / "vae", seed=1)
    refused("is not that of the run's latents", *sample, "out=third", "codec.folder=vae")
    config = tmp_path / "moved/config.json"
    config.write_text(config.read_text().replace("0.7", "0.5"))
    refused("is not that of the run's latents", *sample, "out=third", "codec.folder=moved")
    assert not (tmp_path / "third").exists()


def test_experiment_trains_in_latents_of_pictures(command, only_run, tmp_path):
    """experiment=dit_imagenet256 with a small network and three classes of pictures."""
    for number in range(12):
        folder = tmp_path / "pictures" / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        colour = (20 * number, 255 - 20 * number, 99)
        Image.new("RGB", (16, 16), colour).save(folder / f"{number}.png")
    write_autoencoder(tmp_path / "vae", in_channels=3, out_channels=3)
    options = [
        "experiment=dit_imagenet256",
        "data.root=pictures",
        "data.image_size=16",
        "data.num_classes=3",
        f"data.cache={tmp_path / 'index'}",
        "codec.folder=vae",
        f"codec.cache={tmp_path / 'latents'}",
        *("model.width=16", "model.depth=1", "model.heads=2"),
        *("batch_size=4", "trainer.max_steps=1", "trainer.accelerator=cpu", "sampler.steps=2"),
        *("logger=csv", "metrics=none", "callbacks.sample_images.n=2"),
    ]
    assert command("train", *options) == 0
    assert checkpoint(only_run(), 1)["state_dict"]["loss.denoiser.network.linear_out.weight"].shape == (
        16,
        16,
    )

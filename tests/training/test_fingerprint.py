"""Code fingerprints: which modules a training depends on, and which changes count."""

import importlib
import sys
from functools import partial

import pytest
import torch
from torch import nn

from src.conditioning import ByClass
from src.data.codec import Pixels
from src.data.datamodule import ImageDataModule
from src.data.digits import Digits
from src.diffusion.denoiser import Denoiser
from src.diffusion.loss import DenoisingLoss
from src.diffusion.parameterization import V
from src.diffusion.schedule import Cosine
from src.diffusion.time_sampling import Uniform
from src.diffusion.weighting import SNR
from src.model.unet import UNet
from src.training.ema import EMA
from src.training.fingerprint import FORMAT, code_fingerprints
from src.training.lr_schedule import WarmUp
from src.training.module import DiffusionModule


def test_modules_of_a_training():
    """Contains all modules that a training step uses, and none of sampling, scoring, logging and saving."""
    network = UNet(channels=1, image_size=8, base_channels=32)
    loss = DenoisingLoss(Denoiser(network, Cosine(8), V()), SNR(), Uniform())
    warmup = partial(WarmUp, warmup_steps=3)
    module = DiffusionModule(loss, torch.optim.Adam, warmup, EMA(), 0, 4, Pixels((1, 8, 8)), ByClass(10))
    code = code_fingerprints((module, ImageDataModule(Digits(), 4, 0)))
    assert code["format"] == FORMAT
    found = set(code["modules"])
    assert found >= {
        "src.conditioning.condition",
        "src.conditioning.conditioning",
        "src.data.codec",
        "src.data.datamodule",
        "src.data.digits",
        "src.data.stream",
        "src.diffusion.denoiser",
        "src.diffusion.parameterization",
        "src.diffusion.schedule.discrete",
        "src.diffusion.time_sampling",
        "src.diffusion.weighting",
        "src.model.blocks",
        "src.model.unet",
        "src.randomness",
        "src.training.ema",
        "src.training.lr_schedule",
        "src.training.module",
    }
    assert any(name.startswith("src.diffusion.loss") for name in found)
    without = ("sampler.base", "sampler.ddim", "spacing", "clipping", "schedule.continuous")
    assert not found & {f"src.diffusion.{name}" for name in without}
    others = ("checkpoint", "signals", "dashboard", "resume", "callbacks")
    assert not [name for name in found if name.startswith(tuple(f"src.training.{other}" for other in others))]
    assert not [name for name in found if name.startswith(("src.runs", "src.errors", "src.generation"))]


FILES = {
    "__init__.py": "from .nets import Net\nfrom .unused import Unused\n",
    "nets.py": '"""Networks."""\nfrom torch import nn\nfrom . import parts\n\n\nclass Net(nn.Module):\n    size = 1\n',
    "parts.py": "def part():\n    from mynetworks import late\n\n    return late.x\n",
    "late.py": "x = 1\n",
    "unused.py": "class Unused:\n    pass\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A user's package with a network. Yields a function that edits files and returns the fingerprints."""
    folder = tmp_path / "mynetworks"
    folder.mkdir()
    monkeypatch.syspath_prepend(tmp_path)

    def fingerprints(**edits):
        for name, text in {**FILES, **{f"{name}.py": text for name, text in edits.items()}}.items():
            (folder / name).write_text(text)
        importlib.invalidate_caches()
        module = importlib.import_module("mynetworks")
        return code_fingerprints([nn.Sequential(module.Net())], ("src", "mynetworks"))["modules"]

    yield fingerprints
    for name in [name for name in sys.modules if name.startswith("mynetworks")]:
        del sys.modules[name]


def test_imports_are_followed_to_the_defining_modules(package):
    assert set(package()) == {"mynetworks.nets", "mynetworks.parts", "mynetworks.late"}


@pytest.mark.parametrize(
    ("edits", "changed"),
    [
        ({"nets": FILES["nets.py"].replace("Networks.", "Other words.") + "    # a comment\n"}, set()),
        ({"nets": FILES["nets.py"].replace("size", '"""A number."""\n    size')}, set()),
        ({"nets": FILES["nets.py"].replace("\n", "\r\n")}, set()),
        ({"unused": "import os\n"}, set()),
        ({"more": "x = 1\n"}, set()),
        ({"nets": FILES["nets.py"].replace("size = 1", "size = 2")}, {"mynetworks.nets"}),
        ({"late": "x = 2\n"}, {"mynetworks.late"}),
    ],
)
def test_only_executed_code_counts(package, edits, changed):
    before, after = package(), package(**edits)
    assert {name for name in before if before[name] != after[name]} == changed
    assert before.keys() == after.keys()


def test_other_packages_do_not_count():
    assert code_fingerprints([nn.Linear(1, 1), {"optimizer": torch.optim.Adam}])["modules"] == {}

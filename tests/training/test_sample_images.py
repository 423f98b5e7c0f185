"""Previews of class-conditional runs: a column for each class, and the names of the classes in the dashboard."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from src.conditioning import ByClass
from src.data.codec import Pixels
from src.data.fashion_mnist import FashionMNIST
from src.diffusion.denoiser import Denoiser
from src.diffusion.parameterization import Eps
from src.diffusion.sampler import DDIM
from src.diffusion.schedule import Cosine
from src.diffusion.spacing import Trailing
from src.generation.recipe import Recipe
from src.model import Network
from src.training.callbacks import SampleImages


class ClassAsGrey(Network):
    """Predicts noise such that image i is as bright as its class."""

    image_shape, out_channels, reads = (1, 4, 4), 1, frozenset({"labels"})

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, label, condition=None, to_label=None):
        level = Cosine()([1000]).scalars()[0]
        x0 = condition.labels.to(x)[:, None, None, None] / 9 * 2 - 1
        return self.scale * (x - level.alpha * x0) / level.sigma


class Recorded(WandbLogger):
    """Keeps what is logged."""

    def __init__(self):
        self.logged = []

    def log_image(self, key, images, step=None, **kwargs):
        self.logged.append((key, images, step, kwargs))


class Module(SimpleNamespace):
    @contextmanager
    def averaged(self):
        yield self.denoiser


def test_preview_has_a_column_for_each_class_and_their_names(tmp_path):
    denoiser = Denoiser(ClassAsGrey(), Cosine(), Eps())
    recipe = Recipe(DDIM(), Trailing(), 1, (), Pixels((1, 4, 4)), ByClass(10), seed=0)
    callback = SampleImages(recipe, tmp_path, FashionMNIST(), n=24)
    logger = Recorded()
    with torch.no_grad():
        callback.act(
            SimpleNamespace(is_global_zero=True, global_step=7, loggers=[logger]), Module(denoiser=denoiser)
        )
    ((key, (grid,), step, settings),) = logger.logged
    assert (key, step) == ("samples", 7)
    assert settings["caption"] == [f"columns: {', '.join(FashionMNIST().class_names)}"]
    assert (tmp_path / "step_00000007.png").exists()
    pixels = np.asarray(grid.convert("L").resize((51, 11), Image.Resampling.NEAREST))
    assert pixels.shape == (11, 51), "two full rows of ten"
    centres = pixels[3::5, 3::5][:2, :10].astype(int)
    assert np.allclose(centres[0], centres[1], atol=3)
    assert (np.diff(centres[0]) > 20).all(), "brightness grows with the class"

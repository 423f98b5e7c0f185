"""The tasks that restore images, with an untrained network: known pixels, batches, records and refusals."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from src.conditioning import LowResolution
from src.data.digits import Digits
from src.diffusion.clipping import StaticClipping
from src.diffusion.denoiser import WrappedDenoiser
from src.diffusion.restoration import DDNM, DPS, PiGDM, RePaint, Replacement
from src.diffusion.sampler import DDIM, DDPM, MultistepDPMSolver
from src.errors import UserError
from src.generation.inputs import masks_of
from src.generation.restore import Deblur, Inpaint, SuperResolution, Upsample, psnr
from src.generation.tasks import ImageToImage
from tests.generation import test_tasks

METHODS = [
    Replacement,
    partial(RePaint, jump_length=2, n_resample=2),
    partial(DPS, scale=0.5),
    partial(PiGDM, data_std=0.5),
    DDNM,
]


def loaded(sampler=None, conditioning=None):
    """A run on digits, of 8 x 8 pixels, with an untrained network."""
    run = test_tasks.loaded(sampler or DDPM(), steps=4)
    shape = (1, 8, 8)
    codec = type(run.recipe.codec)(shape)
    recipe = replace(run.recipe, codec=codec, conditioning=conditioning, wrappers=(StaticClipping,))
    return replace(run, source=Digits(), recipe=recipe)


def written(folder):
    return np.stack([np.asarray(Image.open(file)) for file in sorted((folder / "images").iterdir())])


def name_of(method):
    return getattr(method, "func", method).__name__


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_known_pixels_are_the_input_s_bytes(method, tmp_path):
    made = Inpaint("random", 0.5, restoration=method).run(loaded(), 5, 2, tmp_path)
    assert made.record["inputs"]["mask"]["from"] == "random"
    originals = Digits().split("test").images(range(5))[:, 0].numpy()
    found = written(tmp_path)
    filled = masks_of("random", 0.5, (1, 8, 8), 0, 5)[0][:, 0].numpy()
    assert (found == originals)[~filled].all()
    assert (found != originals)[filled].any()


@pytest.mark.parametrize(
    "task",
    [
        partial(Inpaint, "random", 0.5),
        partial(Inpaint, "random", 0.5, restoration=METHODS[1]),
        Deblur,
        Upsample,
        SuperResolution,
    ],
    ids=lambda t: name_of(t),
)
def test_image_i_does_not_depend_on_the_batch_or_the_number(task, tmp_path):
    run = loaded(conditioning=LowResolution(2) if task is SuperResolution else None)
    if isinstance(task, partial) and not task.keywords:
        task = partial(task, restoration=DDNM)
    task().run(run, 5, 5, tmp_path / "whole")
    task().run(run, 3, 1, tmp_path / "parts")
    whole, parts = written(tmp_path / "whole"), written(tmp_path / "parts")
    task().run(run, 2, 2, tmp_path / "whole")
    assert len(written(tmp_path / "whole")) == 2  # none of an earlier run
    assert (np.abs(whole[:3].astype(int) - parts) <= 1).all()
    assert (whole[0] != whole[1]).any()


def test_files_are_measurements(tmp_path):
    small = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    Image.fromarray(small).save(tmp_path / "small.png")
    task = Upsample(noise=0.0, images=str(tmp_path / "small.png"), restoration=DDNM)
    made = task.run(loaded(), 64, 4, tmp_path / "out")
    assert made.record["inputs"]["number"] == 1
    (image,) = written(tmp_path / "out")
    blocks = image.reshape(4, 2, 4, 2).transpose(0, 2, 1, 3).reshape(4, 4, 4)
    within = (blocks.min(axis=2) > 0) & (blocks.max(axis=2) < 255)  # bytes end at 0 and 255
    assert within.sum() >= 4
    assert np.abs(blocks.mean(axis=2) - small)[within].max() <= 0.5  # the rounding of four bytes


def test_superres_reads_the_file_and_not_the_examples(tmp_path):
    seen = []

    class Reading(test_tasks.Wavy):
        def forward(self, x, label, condition=None):
            seen.append(condition.image)
            return super().forward(x, label)

    conditioning = LowResolution(2)
    run = loaded(conditioning=conditioning)
    network = Reading()
    network.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    run = replace(
        run, denoiser=type(run.denoiser)(network, run.denoiser.schedule, run.denoiser.parameterization)
    )
    small = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    Image.fromarray(small).save(tmp_path / "small.png")
    SuperResolution(str(tmp_path / "small.png")).run(run, 1, 1, tmp_path / "out")
    low = run.recipe.codec.encode(torch.from_numpy(small)[None, None])
    assert all(torch.equal(image, conditioning.of_low(low).image) for image in seen)


def test_img2img_takes_files(tmp_path):
    Image.fromarray(np.full((20, 30), 9, np.uint8)).save(tmp_path / "a.png")
    made = ImageToImage(images=str(tmp_path)).run(loaded(), 64, 64, tmp_path / "out")
    assert made.record["inputs"]["number"] == 1
    assert (tmp_path / "out" / "grid.png").is_file()


@pytest.mark.parametrize(
    ("task", "run", "message"),
    [
        (SuperResolution(), {}, r"^task=superres needs a run trained with conditioning=low_resolution"),
        (Deblur(restoration=DDNM), {}, r"^restoration: DDNM does not support this measurement"),
        (Upsample(), {"conditioning": LowResolution(2)}, r"^task: this run's network reads a low-resolution"),
        (Inpaint(), {"sampler": MultistepDPMSolver()}, r"^sampler must be a single-step method.*RePaint"),
    ],
)
def test_what_does_not_fit_is_one_line(task, run, message, tmp_path):
    with pytest.raises(UserError, match=message) as raised:
        task.run(loaded(**run), 2, 2, tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Deblur(std=0.0), "std must be positive"),
        (lambda: Deblur(noise=0.0), "noise must be above 0"),
        (lambda: Upsample(factor=1), "factor must be at least 2"),
        (lambda: Upsample(noise=-1.0), "noise must be at least 0"),
        (
            lambda: Upsample(factor=3).run(loaded(), 1, 1, None),
            "factor=3 must divide the run's images, 8 x 8",
        ),
    ],
)
def test_numbers_are_checked(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_guidance_stays_inside_the_clipping():
    run, task = loaded(DDIM()), Upsample()
    inputs = task.inputs(run, 2)
    plan = task.plan(run, inputs, range(2))
    assert list(plan.wrappers) == []
    assert plan.sampler.outer == [StaticClipping]


def test_psnr_of_a_constant_error():
    a = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    assert psnr(a, a + 10) == pytest.approx(20 * np.log10(25.5))


def test_a_second_network_is_moved_to_the_device_of_the_first(tmp_path):
    moved = []

    class Elsewhere(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(1, device="meta"))

        def _apply(self, function, recurse=True):
            moved.append(self)
            self.weight = torch.nn.Parameter(torch.zeros(1))
            return self

    class Guided(WrappedDenoiser):
        def __init__(self, inner):
            super().__init__(inner)
            self.second = Elsewhere()

        def forward(self, x_t, level, condition=None, to=None):
            return self.inner(x_t, level, condition, to)

    run = loaded()
    run = replace(run, recipe=replace(run.recipe, wrappers=(Guided,)))
    Inpaint(restoration=Replacement).run(run, 1, 1, tmp_path)
    assert len(moved) == 1

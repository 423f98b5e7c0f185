"""The job of `src.export`: a run's network in formats of other libraries, with a model card."""

import logging
import shutil
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import DictConfig

from src.app.autoencoder import load_autoencoder, write_autoencoder
from src.app.load import load_with
from src.diffusion.denoiser import Denoiser
from src.errors import UserError
from src.evaluation.record import Record
from src.generation.loaded import LoadedRun
from src.generation.recipe import describe
from src.interop import pipelines, programs
from src.interop.card import Card
from src.runs.files import file_sha256, write_atomically
from src.runs.folder import SCORES_FILE

log = logging.getLogger(__name__)

# Packages of each format, with the extra that installs them.
NEEDS = {"diffusers": ("diffusers",), "onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
LARGEST_DIFFERENCE = 1e-4
"""Between the network and what was written, relative to the largest output."""


def export(config: DictConfig) -> dict[str, float]:
    """Writes a folder with the network and README.md, the model card.

    Args:
        config: conf/export.yaml, composed.

    Returns:
        Nothing: there are no scores.

    Raises:
        UserError: a package is missing, or the run has no counterpart in this format.
    """
    for package in NEEDS[config.format]:
        if find_spec(package) is None:
            raise UserError(f"format={config.format} needs the package {package}: pip install -e '.[export]'")
    out = Path(config.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={config.out}: it exists and is not empty; choose a new folder")
    autoencoder = load_autoencoder(config)
    if autoencoder is not None and config.format != "diffusers":
        raise UserError(f"format={config.format}: an autoencoder is written with format=diffusers")
    loaded = None if autoencoder else load_with(config)[0]
    place = out.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    # beside `out`, so that a refusal or a failed check leaves nothing, and the next attempt is not refused
    with TemporaryDirectory(prefix=f".{place.name}_", dir=place.parent) as temporary:
        folder = Path(temporary) / "exported"  # with the usual permissions, which the temporary one has not
        folder.mkdir()
        try:
            if autoencoder is not None:
                usage, card = write_autoencoder(autoencoder, folder, out)
            else:
                usage = WRITERS[config.format](loaded, folder, out)
                card = card_of(loaded, config.format, usage).text()
        except ValueError as error:
            raise UserError(f"format={config.format}: {error}") from None
        write_atomically(folder / "README.md", card.encode())
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if place.exists():  # empty; it may be the working directory or a mount
            for path in folder.iterdir():
                shutil.move(path, place)
        else:
            folder.rename(place)
    log.info("%s", f"written     {out}, {size / 1e6:.1f} MB\n{usage}")
    return {}


def to_diffusers(loaded: LoadedRun, folder: Path, out: Path) -> str:
    """Writes a folder of diffusers that will lie at `out`; returns how to use it."""
    recipe, denoiser = loaded.recipe, loaded.denoiser
    if recipe.codec.shape != recipe.codec.image_shape:
        raise ValueError("codec: DDPMPipeline and DDIMPipeline make pixels, and this run makes latents")
    bound = pipelines.bound_of(recipe.wrappers)
    name, _ = pipelines.scheduler_config(denoiser, recipe.sampler, recipe.spacing, bound)
    pipelines.write_pipeline(denoiser, recipe.sampler, recipe.spacing, bound, folder)
    options = ""
    if name == "DDIMScheduler":
        options = f", eta={recipe.sampler.eta}, use_clipped_model_output={bound is not None}"
    if denoiser.network.num_classes:
        log.warning(
            "classes: DDPMPipeline and DDIMPipeline pass no classes; the model card has the loop that does"
        )
        return CLASSES.format(
            out=out,
            scheduler=name,
            steps=recipe.steps,
            last=denoiser.network.num_classes,
            shape=", ".join(map(str, recipe.codec.shape)),
            options=options,
        )
    pipeline = name.replace("Scheduler", "Pipeline")
    return PIPELINE.format(out=out, pipeline=pipeline, steps=recipe.steps, options=options)


def to_torch(loaded: LoadedRun, folder: Path, out: Path) -> str:
    """Writes a program of torch.export that will lie in `out`; returns how to use it."""
    check_difference(
        programs.write_program(loaded.denoiser.network.cpu(), labels_of(loaded.denoiser), folder)
    )
    arguments = ", ".join(f"{name}={name}" for name in programs.example(loaded.denoiser.network))
    return TORCH.format(out=out, file=programs.PROGRAM, arguments=arguments, inputs=inputs_of(loaded))


def to_onnx(loaded: LoadedRun, folder: Path, out: Path) -> str:
    """Writes a model of ONNX that will lie in `out`; returns how to use it."""
    check_difference(programs.write_onnx(loaded.denoiser.network.cpu(), labels_of(loaded.denoiser), folder))
    arguments = ", ".join(f'"{name}": {name}' for name in programs.example(loaded.denoiser.network))
    return ONNX.format(out=out, file=programs.ONNX, arguments=arguments, inputs=inputs_of(loaded))


WRITERS = {"diffusers": to_diffusers, "torch": to_torch, "onnx": to_onnx}


def check_difference(difference: float) -> None:
    """Checks the written network against ours.

    Raises:
        UserError: they differ.
    """
    log.info("check       relative difference %.1e for a batch of another size", difference)
    if not difference < LARGEST_DIFFERENCE:
        raise UserError(
            f"the written network differs from the run's by {difference:.1e} of its largest output"
        )


def labels_of(denoiser: Denoiser) -> tuple[float, float]:
    """The labels of the smallest and the largest time of training."""
    schedule, label = denoiser.schedule, denoiser.parameterization.label
    first, last = (float(label(level)) for level in schedule([schedule.t_min, schedule.t_max]).scalars())
    return first, last


def inputs_of(loaded: LoadedRun) -> str:
    """The inputs of the network, in words."""
    channels, height, width = loaded.recipe.codec.shape
    words = f"x (B, {channels}, {height}, {width}), label (B,) float32"
    if "labels" in loaded.denoiser.network.reads:
        words += f", classes (B,) int64 in [0, {loaded.denoiser.network.num_classes}), -1 for no class"
    return words


def card_of(loaded: LoadedRun, format: str, usage: str) -> Card:
    """The model card of a run."""
    denoiser = loaded.denoiser
    path = loaded.found.folder / SCORES_FILE
    record = Record.read(path) if path.is_file() else None
    return Card(
        library="diffusers" if format == "diffusers" else format,
        network=f"{type(denoiser.network).__name__}, {sum(p.numel() for p in denoiser.parameters()):,} parameters",
        data=type(loaded.source).__name__,
        shape=loaded.recipe.codec.image_shape,
        schedule=denoiser.schedule,
        parameterization=denoiser.parameterization,
        scaling=loaded.recipe.codec.describe(),
        protocol={
            "checkpoint_sha256": file_sha256(loaded.found.checkpoint),
            **loaded.record(evaluations=loaded.recipe.steps),
            "parameterization": describe(denoiser.parameterization),
        },
        scores=record.scores if record else {},
        usage=usage,
    )


PIPELINE = """\
```python
import torch
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("{out}")
images = pipeline(
    batch_size=4, num_inference_steps={steps}, generator=torch.manual_seed(0){options}
).images
```"""
CLASSES = """\
```python
import torch
from diffusers import {scheduler}, UNet2DModel

unet = UNet2DModel.from_pretrained("{out}", subfolder="unet")
scheduler = {scheduler}.from_pretrained("{out}", subfolder="scheduler")
scheduler.set_timesteps({steps})
classes = torch.arange(4) % {last}  # {last} is "no class"
x = torch.randn(4, {shape})
with torch.no_grad():
    for t in scheduler.timesteps:
        output = unet(x, t, class_labels=classes).sample
        x = scheduler.step(output, t, x{options}).prev_sample
```"""
TORCH = """\
```python
import torch

network = torch.export.load("{out}/{file}").module()
output = network({arguments})  # {inputs}
```"""
ONNX = """\
```python
import onnxruntime

session = onnxruntime.InferenceSession("{out}/{file}")
output = session.run(None, {{{arguments}}})[0]  # {inputs}
```"""

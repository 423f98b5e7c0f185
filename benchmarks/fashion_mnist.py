"""Fashion-MNIST: this project's DDPM beside denoising-diffusion-pytorch, trained on the same batches.

    python -m benchmarks.fashion_mnist reference     # the scores of real images; fills the cache of the reference
    python -m benchmarks.fashion_mnist ours          # experiment=ddpm_fashion_mnist
    python -m benchmarks.fashion_mnist ours_v        # the same with parameterization=v
    python -m benchmarks.fashion_mnist package       # needs pip install denoising-diffusion-pytorch
    python -m benchmarks.fashion_mnist samples       # images of both at the end, as .npz
    python -m benchmarks.fashion_mnist scores        # FID, KID and fd_fashion_mnist of these
    python -m benchmarks.fashion_mnist details       # over training steps, raw weights, DDIM steps
    python -m benchmarks.fashion_mnist errors        # of the predicted noise, by noise level
    python -m benchmarks.fashion_mnist tables        # Markdown

Each stage continues where it was interrupted and skips what exists; several may be named, and are done in this order.
Everything is in --runs. FID and KID need `make inception`. The CPU time of each part is printed by `tables`.

Equal in both: images and their order, batches, number of parameters (nearly), schedule (linear, T = 1000), target
(eps), loss, dropout, Adam, learning rate with its warm-up, gradient clipping, the largest decay of the average, number
of steps, float32, and the sampler: DDIM from t = 1000 in equal strides, with x0 clipped. Not equal: the layers, and the
warm-up of the average, which is each project's own.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks import denoising_diffusion_pytorch as package
from benchmarks.loading import loaded_run
from src.data.fashion_mnist import FashionMNIST
from src.diffusion.schedule import Linear
from src.evaluation.record import Record
from src.generation.pictures import image_grid, read_images
from src.model import UNet
from src.runs.files import digest_of, read_json, replacing, write_json
from src.runs.folder import CHECKPOINTS, SCORES_FILE, checkpoints_by_step

STAGES = ("reference", "ours", "ours_v", "package", "samples", "scores", "details", "errors", "tables")
OURS = {"ours": (), "ours_v": ("parameterization=v",)}
"""This project's trainings, with their options."""
CODES = (*OURS, "package")
ERROR_TIMES = (999, 950, 900, 800, 600, 400, 200, 50)


@dataclass(frozen=True)
class Settings:
    """What a folder of results depends on, apart from the lengths."""

    base_channels: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Images:
    """Generated images.

    Attributes:
        code: one of `CODES`.
        step: training steps.
        weights: "ema" or "raw".
        steps: of DDIM.
        n: number of images.
    """

    code: str
    step: int
    weights: str
    steps: int
    n: int

    @property
    def name(self) -> str:
        return f"{self.code}_{self.step}_{self.weights}_ddim{self.steps}_{self.n}"


def our_parameters(base_channels: int) -> int:
    """The number of parameters of `unet_small` with this width."""
    with torch.device("meta"):
        return package.parameters_of(
            UNet(28, 1, base_channels=base_channels, channel_multipliers=package.MULTIPLIERS, groups=8)
        )


class Benchmark:
    """The stages.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.at = arguments
        self.runs: Path = arguments.runs
        settings = asdict(Settings(arguments.base_channels, arguments.batch_size, arguments.seed))
        path = self.runs / "settings.json"
        if not path.exists():
            write_json(path, settings)
        stored = read_json(path, dict[str, Any])
        for name, value in settings.items():
            if stored[name] != value:
                option = name.replace("_", "-")
                raise SystemExit(f"--{option} {value}: {self.runs} has {stored[name]}; choose another --runs")

    # training

    def ours(self) -> None:
        """Trains `experiment=ddpm_fashion_mnist` through the command line."""
        self._train("ours")

    def ours_v(self) -> None:
        """The same with v-prediction."""
        self._train("ours_v")

    def _train(self, code: str) -> None:
        folder, at = self.runs / code, self.at
        found = checkpoints_by_step(folder / CHECKPOINTS)
        if found and package.step_of(found[-1]) >= at.steps:
            return
        options = [f"ckpt={folder}"] if found else self._first_options(code, folder)
        with self._cost(f"{code}: training"):
            self._command("train", *options, f"trainer.max_steps={at.steps}")

    def _first_options(self, code: str, folder: Path) -> list[str]:
        at = self.at
        options = [
            f"model.base_channels={at.base_channels}",
            f"batch_size={at.batch_size}",
            f"seed={at.seed}",
        ]
        options += [f"callbacks.checkpoints.every={at.save_every}", "callbacks.checkpoints.keep=1000"]
        options += ["metrics=none", "~callbacks.sample_images", f"validate_every={at.save_every}"]
        return [
            "experiment=ddpm_fashion_mnist",
            "logger=csv",
            *OURS[code],
            *options,
            f"hydra.run.dir={folder}",
        ]

    def package(self) -> None:
        """Trains the package's parts on the batches of `ours`."""
        with self._cost("package: training"):
            at = self.at
            package.train(
                self._package_width(), at.steps, at.batch_size, at.seed, at.save_every, self.runs / "package"
            )

    def _package_width(self) -> int:
        return package.closest_width(our_parameters(self.at.base_channels))

    # images

    def sampled(self, images: Images) -> Path:
        """The .npz of generated images, which are made if they do not exist."""
        path = self._path(images)
        if path.exists():
            return path
        folder = self.runs / "samples" / images.name
        with self._cost(f"{images.code}: sampling {images.name}"):
            if images.code in OURS:
                checkpoint = self._checkpoints(images.code)[images.step]
                chosen = [f"weights={images.weights}", f"sampler.steps={images.steps}"]
                chosen += [f"n={images.n}", f"out={folder}", f"batch_size={package.AT_ONCE}"]
                self._command("sample", f"run={checkpoint}", *chosen)
            else:
                checkpoint = self._checkpoints("package")[images.step]
                diffusion = package.load(checkpoint, self._package_width(), images.weights, images.steps)
                package.sample(diffusion, images.n, self.at.seed, folder / "images")
        pixels = read_images(folder / "images", range(images.n), 1)
        return write_npz(path, pixels)

    def _checkpoints(self, code: str) -> dict[int, Path]:
        """By step."""
        if code in OURS:
            found = checkpoints_by_step(self.runs / code / CHECKPOINTS)
        else:
            found = (self.runs / code).glob("step_*.pt")
        return {package.step_of(path): path for path in found}

    @property
    def codes(self) -> list[str]:
        """Those that have been trained to the end, or whose images are there."""
        return [
            code
            for code in CODES
            if self.at.steps in self._checkpoints(code) or self._path(self._final(code)).exists()
        ]

    def _path(self, images: Images) -> Path:
        return self.runs / "samples" / f"{images.name}.npz"

    def samples(self) -> None:
        """The images of all trainings at their end."""
        for images in self.final():
            self.sampled(images)

    def final(self) -> list[Images]:
        """What FID and KID are computed of."""
        return [self._final(code) for code in self.codes]

    def _final(self, code: str) -> Images:
        return Images(code, self.at.steps, "ema", self.at.ddim_steps, self.at.n)

    # scores

    def reference(self) -> None:
        """Scores real images of the test set, n and details_n of them, in place of generated ones."""
        for n in sorted({self.at.n, self.at.details_n}):
            self.cheap(self._real("test", n))
        self.inception(self._real("test", self.at.n))

    def _real(self, split: str, n: int) -> Path:
        path = self.runs / "samples" / f"{split}_{n}.npz"
        return path if path.exists() else write_npz(path, FashionMNIST().split(split).images(range(n)))

    def scores(self) -> None:
        """FID, KID and fd_fashion_mnist of the images of all."""
        for images in self.final():
            self.cheap(self.sampled(images))
            self.inception(self.sampled(images))

    def inception(self, images: Path) -> Record:
        """FID and KID against the training images, or the first of them."""
        n = self.at.reference_images
        reference = str(self._real("train", n)) if n else "fashion_mnist"
        return self._scored(images, "[fid,kid]", reference, f"inception_{n or 'all'}")

    def cheap(self, images: Path) -> Record:
        """fd_fashion_mnist against all training images."""
        return self._scored(images, "fd_fashion_mnist", "fashion_mnist", "classifier")

    def _scored(self, images: Path, metrics: str, reference: str, name: str) -> Record:
        place = self.runs / "records" / name
        if found := self._record(images, name):
            return found
        with self._cost(f"scoring {images.stem}: {metrics}"):
            given = [f"images={images}", f"reference={reference}", f"metrics={metrics}"]
            self._command("evaluate", *given, f"runs={place}", f"cache={self.runs / 'cache'}")
        return self._record(images, name)

    def _record(self, images: Path, name: str) -> Record | None:
        pattern = f"scores/{images.stem}_*/{SCORES_FILE}"
        found = next(iter((self.runs / "records" / name).glob(pattern)), None)
        return None if found is None else Record.read(found)

    def details(self) -> None:
        """fd_fashion_mnist over training steps, of raw weights and over the steps of DDIM."""
        wanted = [*self.over_training(), *self.of_weights(), *self.over_ddim()]
        for images in track(wanted, "details", console=Console(stderr=True)):
            self.cheap(self.sampled(images))

    def _detail(self, code: str, step: int, weights: str = "ema", steps: int | None = None) -> Images:
        return Images(code, step, weights, steps or self.at.ddim_steps, self.at.details_n)

    def over_training(self) -> list[Images]:
        """By code and training steps."""
        marks = range(self.at.curve_every, self.at.steps + 1, self.at.curve_every)
        return [self._detail(code, step) for step in marks for code in self.codes]

    def of_weights(self) -> list[Images]:
        """Averaged and raw weights."""
        return [
            self._detail(code, self.at.steps, weights) for code in self.codes for weights in ("ema", "raw")
        ]

    def over_ddim(self) -> list[Images]:
        """By code and DDIM's steps."""
        return [
            self._detail(code, self.at.steps, steps=steps)
            for steps in self.at.table_steps
            for code in self.codes
        ]

    def errors(self) -> None:
        """Prints the mean squared error of the predicted noise on test images, averaged weights, by time.

        Each network's second column leaves out the two components of an image's error along a constant image and along
        the noise itself: a network that knows everything but the mean and the scale of x_t has an error in these only.
        """
        levels = Linear()(ERROR_TIMES).scalars()
        x0 = FashionMNIST().split("test").images(range(self.at.errors_n)).float() / 127.5 - 1
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(self.at.seed))
        predictions = {
            code: self._our_eps(code) if code in OURS else self._their_eps() for code in self.codes
        }
        print(f"mean squared error of eps, {len(x0)} test images; and without mean and scale\n")
        print(f"| t | {' | | '.join(predictions)} | |\n| --- |{' --- | --- |' * len(predictions)}")
        for t, level in zip(ERROR_TIMES, levels, strict=True):
            cells = []
            for predict in predictions.values():
                with torch.no_grad():
                    error = predict(level.alpha * x0 + level.sigma * noise, t) - noise
                cells += [error.square().mean(), without_mean_and_scale(error, noise).square().mean()]
            print(f"| {t} | {' | '.join(f'{cell:.5f}' for cell in cells)} |", flush=True)

    def _our_eps(self, code: str) -> Callable[[Tensor, int], Tensor]:
        denoiser = loaded_run(str(self._checkpoints(code)[self.at.steps]), "device=cpu").denoiser
        return lambda x_t, t: denoiser(x_t, denoiser.schedule([t]).scalars()[0]).eps

    def _their_eps(self) -> Callable[[Tensor, int], Tensor]:
        checkpoint = self._checkpoints("package")[self.at.steps]
        diffusion = package.load(checkpoint, self._package_width(), "ema", None)
        return lambda x_t, t: diffusion.model(x_t, torch.full((len(x_t),), t - 1))

    # tables

    def tables(self) -> None:
        """Prints what exists."""
        ours, width = our_parameters(self.at.base_channels), self._package_width()
        with torch.device("meta"):
            theirs = package.parameters_of(package.unet(width))
        print(f"parameters: ours {ours:,}, package {theirs:,} (dim={width})\n")
        self._print_final()
        for title, part, wanted in (
            ("training steps", "step", self.over_training()),
            ("weights", "weights", self.of_weights()),
            ("steps of DDIM", "steps", self.over_ddim()),
        ):
            print(
                f"\nfd_fashion_mnist of {self.at.details_n:,} images\n\n| {title} | {' | '.join(self.codes)} |"
            )
            print(f"| --- |{' --- |' * len(self.codes)}")
            for value in dict.fromkeys(getattr(images, part) for images in wanted):
                row = [images for images in wanted if getattr(images, part) == value]
                cells = (self._cell(self._path(images)) for images in row)
                print(f"| {value} | {' | '.join(cells)} |")
        print("\n| part | CPU minutes |\n| --- | --- |")
        for path in sorted((self.runs / "costs").glob("*.json")):
            cost = read_json(path, dict[str, Any])
            print(f"| {cost['part']} | {cost['seconds'] / 60:.1f} |")
        made = [path for path in map(self._path, self.final()) if path.exists()]
        if self.at.picture and made:
            side_by_side(*(first_images(path, 64) for path in made)).save(self.at.picture)

    def _cell(self, images: Path) -> str:
        record = self._record(images, "classifier")
        return record.printed("fd_fashion_mnist") if record else ""

    def _print_final(self) -> None:
        against = f"{self.at.reference_images or 60_000:,} training images"
        print(f"{self.at.n:,} images; FID and KID against {against}\n")
        print("| images | FID | KID | fd_fashion_mnist |\n| --- | --- | --- | --- |")
        rows = {images.code: self._path(images) for images in self.final()}
        for name, path in {**rows, "test images": self._real("test", self.at.n)}.items():
            inception = self._record(path, f"inception_{self.at.reference_images or 'all'}")
            cells = [inception.printed(score) if inception else "" for score in ("fid", "kid")]
            print(f"| {name} | {' | '.join(cells)} | {self._cell(path)} |")

    # commands

    def _command(self, entry_point: str, *options: str) -> None:
        """Runs an entry point; its output goes to this terminal."""
        line = [sys.executable, "-m", f"src.{entry_point}", *options]
        if subprocess.run(line, env=os.environ).returncode:
            raise SystemExit(f"failed: python {' '.join(line[1:])}")

    @contextmanager
    def _cost(self, part: str) -> Iterator[None]:
        """Adds the CPU seconds of this process and its commands to <runs>/costs, also after an interrupt."""
        start = cpu_seconds()
        try:
            yield
        finally:
            path = self.runs / "costs" / f"{digest_of(part)}.json"
            before = read_json(path, dict[str, Any])["seconds"] if path.exists() else 0.0
            write_json(path, {"part": part, "seconds": before + cpu_seconds() - start})


def cpu_seconds() -> float:
    """CPU time of this process and of its finished commands."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def without_mean_and_scale(error: Tensor, noise: Tensor) -> Tensor:
    """What is left of errors, (n, C, H, W), off the plane of the constant image and the noise, per image."""
    constant = torch.ones_like(noise).flatten(1)
    basis, _ = torch.linalg.qr(torch.stack((constant, noise.flatten(1)), dim=2).double())
    flat = error.flatten(1).double()[..., None]
    return (flat - basis @ (basis.mT @ flat)).view_as(error)


def write_npz(path: Path, pixels: Tensor) -> Path:
    """Writes images, uint8 (n, C, H, W), as <path>, an .npz with arr_0 (n, H, W, C); returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        np.savez(file, pixels.permute(0, 2, 3, 1).numpy())
    return path


def first_images(path: Path, n: int) -> Tensor:
    """The first images of an .npz file, uint8 (n, C, H, W)."""
    return torch.from_numpy(np.load(path)["arr_0"][:n]).permute(0, 3, 1, 2)


def side_by_side(*sets: Tensor) -> Image.Image:
    """Grids of images with gaps."""
    grids = [image_grid(images) for images in sets]
    distance = grids[0].width + 16
    picture = Image.new("L", (distance * len(grids) - 16, grids[0].height), "white")
    for number, grid in enumerate(grids):
        picture.paste(grid, (distance * number, 0))
    return picture


def main(given: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--runs", type=Path, default=Path("runs/fashion_mnist"))
    parser.add_argument("--steps", type=int, default=8000, help="training steps of each")
    parser.add_argument("--base-channels", type=int, default=32, help="of our network; 32 is unet_small")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--n", type=int, default=10_000, help="images for FID and KID")
    parser.add_argument("--ddim-steps", type=int, default=50)
    parser.add_argument("--reference-images", type=int, default=0, help="first training images; 0 for all")
    parser.add_argument("--details-n", type=int, default=1000, help="images of each score of `details`")
    parser.add_argument(
        "--curve-every", type=int, default=1000, help="training steps; a multiple of save-every"
    )
    parser.add_argument("--table-steps", type=int, nargs="+", default=[5, 10, 20, 50, 100])
    parser.add_argument("--errors-n", type=int, default=200, help="test images of `errors`")
    parser.add_argument("--picture", type=Path, help="where `tables` draws the first images of both")
    arguments = parser.parse_args(given)
    if {*arguments.stages} - {"reference", *OURS} and not find_spec("denoising_diffusion_pytorch"):
        raise SystemExit("pip install denoising-diffusion-pytorch, which these stages need")
    benchmark = Benchmark(arguments)
    for stage in STAGES:
        if stage in arguments.stages:
            getattr(benchmark, stage)()


if __name__ == "__main__":
    main()

"""The tasks of `src.sample`: new images, trajectories, interpolations, reconstructions, img2img."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from src.data.source import Split
from src.diffusion.sampler import DDIM, Euler, Sampler, State, encode, renoise, slerp
from src.errors import UserError
from src.generation.inputs import OWN_CONDITION, files_of, inputs_of
from src.generation.loaded import LoadedRun
from src.generation.pictures import (
    animation,
    captioned_grid,
    image_grid,
    image_rows,
    read_images,
    save_images,
)
from src.generation.recipe import CLIPPING, describe, kind_of
from src.runs.files import Damaged, file_sha256, read_json, write_atomically, write_json
from src.runs.processes import barrier, gathered, rank, world_size

GRID = 1024
"""Largest number of images in a grid."""
LISTED = 256
"""Largest number of images in a grid whose classes are printed."""


class Made(NamedTuple):
    """The result of a task.

    Attributes:
        lines: the written files, for the terminal.
        evaluations: network evaluations per image.
        record: what else the result depends on, for records.
    """

    lines: list[str]
    evaluations: int
    record: Mapping[str, Any] = MappingProxyType({})


class Task(ABC):
    """A task of `src.sample`.

    Attributes:
        from_noise: whether sampling starts from pure noise, not from images of the data.
        shared: whether all processes share the work; otherwise only rank 0 runs the task.
        own_condition: whether the network reads the condition of the data's images, not that of a sampling run.
    """

    from_noise: ClassVar[bool] = True
    shared: ClassVar[bool] = False
    own_condition: bool = False

    @abstractmethod
    def run(self, loaded: LoadedRun, n: int, batch_size: int, folder: Path) -> Made:
        """Runs the task.

        Args:
            loaded: the denoiser and the recipe.
            n: number of images or rows.
            batch_size: images per batch, for tasks that use batches.
            folder: the output folder.

        Raises:
            ValueError: an argument of the task is invalid for this recipe.
            UserError: the task does not support this recipe.
        """


class Draw(Task):
    """New images: a grid, the single images and, with `gif`, an animation of the denoising.

    With text, prompts stand below the images of the grid, and prompts.json lists the prompt of each image.

    An interrupted run can be repeated: complete batches of the same weights and recipe are kept, and the result is
    identical to that of an uninterrupted run.

    Args:
        gif: also write an animation of the first 64 images.
    """

    shared = True

    def __init__(self, gif: bool = False):
        self.gif = gif

    def run(self, loaded, n, batch_size, folder):
        batches = [range(first, min(first + batch_size, n)) for first in range(0, n, batch_size)]
        origin = _Origin(loaded, batch_size, folder)
        if rank() == 0:
            origin.prepare()
        barrier()
        evaluations = origin.evaluations()
        mine, channels = batches[rank() :: world_size()], loaded.recipe.codec.image_shape[0]
        with _Writer(folder / "images") as writer:
            for numbers in track(mine, description="sampling", transient=True, disable=rank() > 0):
                if evaluations and read_images(folder / "images", numbers, channels) is not None:
                    continue
                (made,) = loaded.recipe.images(loaded.denoiser, numbers, batch_size)
                writer.save(made.images, numbers.start)
                if made.evaluations > evaluations:
                    evaluations = made.evaluations
                    origin.keep(evaluations)
        evaluations = max(gathered(evaluations))
        if rank() > 0:
            return Made([], evaluations)
        origin.keep(evaluations)
        shown = min(n, GRID)
        images = read_images(folder / "images", range(shown), channels)
        texts = loaded.recipe.texts(range(n))
        grid = captioned_grid(images, texts and texts[:shown], loaded.recipe.columns(shown))
        lines = save_grid(grid, folder)
        if texts is not None:
            write_atomically(folder / "prompts.json", json.dumps(texts, indent=2).encode())
            lines.append(f"prompts     {folder / 'prompts.json'}")
        if shown <= LISTED and (caption := loaded.recipe.caption(shown, loaded.class_names)):
            lines.append(f"classes     {caption}")
        lines.append(f"images      {folder / 'images'} ({n})")
        if self.gif:
            states = loaded.recipe.trajectory(loaded.denoiser, range(min(n, 64)))
            states = track(states, description="animation", total=loaded.recipe.steps + 1, transient=True)
            animation(states, loaded.recipe.codec).save(folder / "denoising.gif")
            lines.append(f"animation   {folder / 'denoising.gif'}")
        return Made(lines, evaluations)


class _Writer:
    """Writes a batch of images while the next one is sampled, since compression can take as long as a small network.

    An error of writing is raised by the next `save`, or at the end.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._wait()

    def save(self, images: Tensor, first: int) -> None:
        """Writes images, numbered from `first`; see `save_images`."""
        self._wait()
        self._last = self._pool.submit(save_images, images.cpu(), self.folder, first)

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()


class _Origin:
    """The weights and the recipe of the images in a folder, stored in <folder>/origin.json."""

    def __init__(self, loaded: LoadedRun, batch_size: int, folder: Path):
        self.folder = folder
        self.path = folder / "origin.json"
        self.content: dict[str, Any] = {
            "checkpoint": file_sha256(loaded.found.checkpoint),
            "batch_size": batch_size,
            "device": loaded.device.type,
            **loaded.record(evaluations=0),
        }

    def evaluations(self) -> int:
        """Network evaluations per image of the existing images; 0 if they are of another origin."""
        try:
            stored = read_json(self.path, dict[str, Any])
        except (FileNotFoundError, Damaged):
            return 0
        evaluations = stored.get("network_evaluations")
        same = stored == {**self.content, "network_evaluations": evaluations}
        return evaluations if same and isinstance(evaluations, int) else 0

    def prepare(self) -> None:
        """Removes images of another origin."""
        if not self.evaluations():
            for image in (self.folder / "images").glob("[0-9]*"):
                image.unlink()
            self.keep(0)

    def keep(self, evaluations: int) -> None:
        """Records the origin and the number of evaluations."""
        write_json(self.path, {**self.content, "network_evaluations": evaluations})


class Trajectory(Task):
    """The steps from noise to image: two rows per image, x_t above the estimate of x0.

    Args:
        columns: number of states shown, evenly spaced over the steps.
    """

    def __init__(self, columns: int = 10):
        if columns < 2:
            raise ValueError(f"columns must be at least 2, got {columns}")
        self.columns = columns

    def run(self, loaded, n, batch_size, folder):
        recipe = loaded.recipe
        states = list(recipe.trajectory(loaded.denoiser, range(n)))[1:]
        places = torch.linspace(0, len(states) - 1, min(self.columns, len(states))).round().long().unique()
        shown = [states[place] for place in places.tolist()]
        noisy, clean = (
            torch.stack(rows, dim=1) for rows in ([s.x for s in shown], [s.prediction.x0 for s in shown])
        )
        strips = torch.stack([noisy, clean], dim=1).flatten(0, 2)
        grid = image_grid(recipe.codec.decode(strips), columns=len(shown))
        return Made(save_grid(grid, folder), states[-1].evaluations)


class Interpolate(Task):
    """Spherical interpolation between pairs of latents, one row per pair (Song et al. 2021, sec. 5.3).

    The first and last image of row j are images 2j and 2j + 1 of `Draw`. With a condition, the whole row has the
    condition of its first image, so that only the first image is the same as in `Draw`.

    Args:
        columns: images per row, at least 2.
    """

    def __init__(self, columns: int = 9):
        if columns < 2:
            raise ValueError(f"columns must be at least 2, got {columns}")
        self.columns = columns

    def run(self, loaded, n, batch_size, folder):
        recipe, denoiser = loaded.recipe, loaded.denoiser
        ends, condition, noise = recipe.start(denoiser, range(2 * n))
        weights = torch.linspace(0, 1, self.columns, dtype=torch.float64)
        rows = torch.stack([slerp(ends[0::2], ends[1::2], float(w)) for w in weights], dim=1)
        if condition is not None:
            condition = condition.index(torch.arange(0, 2 * n, 2).repeat_interleave(self.columns))
        # the end images use the noise streams of `Draw`; each image in between has a separate stream
        of_rows = recipe.noise(range(n * self.columns), loaded.device, "interpolation")
        of_rows.generators[:: self.columns] = noise.generators[0::2]
        of_rows.generators[self.columns - 1 :: self.columns] = noise.generators[1::2]
        times = recipe.times(denoiser.schedule)
        last = last_state(
            recipe.sampler.trajectory(recipe.around(denoiser), rows.flatten(0, 1), times, condition, of_rows)
        )
        grid = image_grid(recipe.codec.decode(last.x), columns=self.columns)
        return Made(save_grid(grid, folder), last.evaluations)


class Reconstruct(Task):
    """Images of the data, encoded by DDIM inversion and decoded (Song et al. 2021, sec. 5.4).

    The grid shows each image above its reconstruction.

    Args:
        split: the split of the data.
        tolerance: tolerance of each inversion step; null for one evaluation per step.
    """

    from_noise = False
    own_condition = True

    def __init__(self, split: Split = "test", tolerance: float | None = None):
        self.split = split
        self.tolerance = tolerance

    def run(self, loaded, n, batch_size, folder):
        recipe, denoiser = loaded.recipe, loaded.denoiser
        if not _is_deterministic_ddim(recipe.sampler):
            raise UserError(
                f"task=reconstruct encodes by DDIM inversion, which needs a deterministic DDIM sampler, not"
                f" {describe(recipe.sampler)}: choose sampler=ddim sampler.eta=0, or sampler=euler without churn"
            )
        if any(kind_of(wrapper) not in CLIPPING for wrapper in recipe.wrappers):
            raise UserError(
                "task=reconstruct inverts the network's own prediction: choose guidance=none and no wrappers"
            )
        x0, condition = loaded.data(self.split, range(n))
        times = recipe.times(denoiser.schedule)
        states = encode(denoiser, x0, times, condition, self.tolerance)
        encoded = last_state(track(states, description="encoding", total=len(times), transient=True))
        # without wrappers, as in the encoding
        decoded = last_state(recipe.sampler.trajectory(denoiser, encoded.x, times, condition))
        error = (decoded.x - x0).square().mean().sqrt().item()
        lines = save_grid(image_rows(recipe.codec.decode(x0), recipe.codec.decode(decoded.x)), folder)
        lines.append(f"error       {error:.4g} (root mean square, images in [-1, 1])")
        record = {} if condition is None else {"labels": OWN_CONDITION}
        return Made(lines, encoded.evaluations + decoded.evaluations, record)


class ImageToImage(Task):
    """Images, partially noised and then denoised (SDEdit, Meng et al. 2022).

    The grid shows each image above its edited version.

    Args:
        strength: the fraction of the steps that is run, in (0, 1]; larger values change the image more.
        images: a file or a folder, scaled and cropped to the run's size; None for images of `split`.
        split: the split of the data.
    """

    from_noise = False

    def __init__(self, strength: float = 0.5, images: str | None = None, split: Split = "test"):
        self.strength, self.images, self.split = strength, images, split
        self.own_condition = images is None
        if images is not None:
            files_of(images, "task.images")  # checks it

    def run(self, loaded, n, batch_size, folder):
        recipe, denoiser = loaded.recipe, loaded.denoiser
        inputs = inputs_of(loaded, self.images, self.split, n, scaled=True)
        numbers = range(len(inputs.images))
        x0 = recipe.codec.encode(inputs.images.to(loaded.device))
        condition = inputs.condition_of(loaded, numbers, x0)
        noise = recipe.noise(numbers, loaded.device)
        x_t, times = renoise(denoiser, x0, recipe.times(denoiser.schedule), self.strength, noise)
        last = last_state(recipe.sampler.trajectory(recipe.around(denoiser), x_t, times, condition, noise))
        grid = image_rows(inputs.images, recipe.codec.decode(last.x).cpu())
        record = {"inputs": inputs.record, "labels": inputs.describe_condition(recipe.conditioning)}
        return Made(save_grid(grid, folder), last.evaluations, record)


def _is_deterministic_ddim(sampler: Sampler) -> bool:
    """Whether the sampler is deterministic DDIM, which `encode` inverts."""
    match sampler:
        case DDIM(eta=0) | Euler(s_churn=0):
            return True
    return False


def last_state(states: Iterable[State]) -> State:
    """The last state; each earlier state is freed before the next step."""
    for state in states:
        last = state
        del state  # frees its memory for the next step
    return last


def save_grid(grid: Image.Image, folder: Path) -> list[str]:
    """Writes <folder>/grid.png; returns the line for the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    grid.save(folder / "grid.png")
    return [f"grid        {folder / 'grid.png'}"]

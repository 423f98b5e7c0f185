"""What `src.sample` makes of a trained run: new images, paths between them, and edits of given ones."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from src.data.codec import Codec
from src.diffusion.sampler import DDIM, Euler, PerImageNoise, Sampler, State, encode, renoise, slerp
from src.errors import UserError
from src.generation.loaded import LoadedRun
from src.generation.pictures import animation, image_grid, read_images, save_images
from src.generation.recipe import describe
from src.runs.files import file_sha256, write_json
from src.runs.processes import barrier, gathered, rank, world_size

GRID = 1024
"""Most images of a grid."""


class Made(NamedTuple):
    """What a task has made.

    Attributes:
        lines: what lies where, for the terminal.
        evaluations: of the network for each image.
    """

    lines: list[str]
    evaluations: int


class Task(ABC):
    """Something to make with a trained run.

    Attributes:
        from_noise: whether images begin as noise alone, not as images of the data.
        shared: whether several processes share the work; else the first one does it alone.
    """

    from_noise: ClassVar[bool] = True
    shared: ClassVar[bool] = False

    @abstractmethod
    def run(self, loaded: LoadedRun, n: int, batch_size: int, folder: Path) -> Made:
        """Makes it.

        Args:
            loaded: the denoiser and the recipe.
            n: how many.
            batch_size: images made at once, where they can be many.
            folder: where files are written.

        Raises:
            ValueError: a number of the task is impossible with this recipe.
            UserError: the recipe does not fit the task.
        """


class Draw(Task):
    """New images: a grid, the single images and, with `gif`, an animation of the denoising.

    A drawing that was killed is completed with the bytes that it would have had: batches whose images are all there
    are not made again, if they are of the same weights and recipe.

    Args:
        gif: also the animation, of the first 64 images.
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
        for numbers in track(mine, description="sampling", transient=True, disable=rank() > 0):
            if evaluations and read_images(folder / "images", numbers, channels) is not None:
                continue
            (made,) = loaded.recipe.images(loaded.denoiser, numbers, batch_size)
            save_images(made.images, folder / "images", first=numbers.start)
            if made.evaluations > evaluations:
                evaluations = made.evaluations
                origin.keep(evaluations)
        evaluations = max(gathered(evaluations))
        if rank() > 0:
            return Made([], evaluations)
        lines = _save_grid(image_grid(read_images(folder / "images", range(min(n, GRID)), channels)), folder)
        lines.append(f"images      {folder / 'images'} ({n})")
        if self.gif:
            states = loaded.recipe.trajectory(loaded.denoiser, range(min(n, 64)))
            states = track(states, description="animation", total=loaded.recipe.steps + 1, transient=True)
            animation(states, loaded.recipe.codec).save(folder / "denoising.gif")
            lines.append(f"animation   {folder / 'denoising.gif'}")
        return Made(lines, evaluations)


class _Origin:
    """What the images in a folder were made of, kept in <folder>/origin.json."""

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
        """Of the images that are there; 0 if they are of another origin."""
        try:
            stored = json.loads(self.path.read_text())
            evaluations = stored.pop("network_evaluations")
        except (OSError, ValueError, KeyError, AttributeError):
            return 0
        same = {name: value for name, value in self.content.items() if name != "network_evaluations"}
        return evaluations if stored == same and isinstance(evaluations, int) else 0

    def prepare(self) -> None:
        """Removes images of another origin: after a kill they would pass for ours."""
        if not self.evaluations():
            for image in (self.folder / "images").glob("[0-9]*"):
                image.unlink()
            self.keep(0)

    def keep(self, evaluations: int) -> None:
        """Records the origin of the images to come."""
        write_json(self.path, {**self.content, "network_evaluations": evaluations})


class Trajectory(Task):
    """The steps from noise to image: a row for each image, its x_t above and the estimate of x0 below.

    Args:
        columns: how many states are shown, evenly over the steps.
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
        return Made(_save_grid(grid, folder), states[-1].evaluations)


class Interpolate(Task):
    """Rows of images between two latents, by spherical interpolation (Song et al. 2021, sec. 5.3).

    The first and the last image of row j are images 2j and 2j + 1 of `Draw`. With a condition, a row has that of its
    first image, and only the first image is the same.

    Args:
        columns: images of a row, at least 2.
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
        # the ends continue with the noise that they started from, as in `Draw`; each image between has its own
        of_rows = PerImageNoise(recipe.seed, range(n * self.columns), "interpolation")
        of_rows.generators[:: self.columns] = noise.generators[0::2]
        of_rows.generators[self.columns - 1 :: self.columns] = noise.generators[1::2]
        times = recipe.times(denoiser.schedule)
        last = _last(
            recipe.sampler.trajectory(recipe.around(denoiser), rows.flatten(0, 1), times, condition, of_rows)
        )
        grid = image_grid(recipe.codec.decode(last.x), columns=self.columns)
        return Made(_save_grid(grid, folder), last.evaluations)


class Reconstruct(Task):
    """Images of the data, encoded by DDIM inversion and decoded again (Song et al. 2021, sec. 5.4).

    The grid holds each image above its reconstruction.

    Args:
        split: of the data.
        tolerance: accuracy to which each step of the inversion is solved; null for one evaluation a step.
    """

    from_noise = False

    def __init__(
        self, split: Literal["train", "validation", "test"] = "test", tolerance: float | None = None
    ):
        self.split = split
        self.tolerance = tolerance

    def run(self, loaded, n, batch_size, folder):
        recipe, denoiser = loaded.recipe, loaded.denoiser
        if not _is_deterministic_ddim(recipe.sampler):
            raise UserError(
                f"task=reconstruct encodes by DDIM inversion, which {describe(recipe.sampler)} does not invert: choose"
                " sampler=ddim sampler.eta=0, or sampler=euler without churn, which is the same method"
            )
        x0, condition = loaded.data(self.split, range(n))
        times = recipe.times(denoiser.schedule)
        states = encode(denoiser, x0, times, condition, self.tolerance)
        encoded = _last(track(states, description="encoding", total=len(times), transient=True))
        # without wrappers, as it was encoded
        decoded = _last(recipe.sampler.trajectory(denoiser, encoded.x, times, condition))
        error = (decoded.x - x0).square().mean().sqrt().item()
        lines = _save_grid(_pairs(x0, decoded.x, recipe.codec), folder)
        lines.append(f"error       {error:.4g} (root mean square, images in [-1, 1])")
        return Made(lines, encoded.evaluations + decoded.evaluations)


class ImageToImage(Task):
    """Images of the data, noised part of the way and denoised from there (SDEdit, Meng et al. 2022).

    The grid holds each image above its edited version.

    Args:
        strength: the share of the steps that is taken, in (0, 1]; 1 keeps least of the image.
        split: of the data.
    """

    from_noise = False

    def __init__(self, strength: float = 0.5, split: Literal["train", "validation", "test"] = "test"):
        self.strength = strength
        self.split = split

    def run(self, loaded, n, batch_size, folder):
        recipe, denoiser = loaded.recipe, loaded.denoiser
        x0, condition = loaded.data(self.split, range(n))
        noise = PerImageNoise(recipe.seed, range(n))
        x_t, times = renoise(denoiser, x0, recipe.times(denoiser.schedule), self.strength, noise)
        last = _last(recipe.sampler.trajectory(recipe.around(denoiser), x_t, times, condition, noise))
        return Made(_save_grid(_pairs(x0, last.x, recipe.codec), folder), last.evaluations)


def _is_deterministic_ddim(sampler: Sampler) -> bool:
    """Whether the sampler is the method that `encode` inverts."""
    match sampler:
        case DDIM(eta=0) | Euler(s_churn=0):
            return True
    return False


def _last(states: Iterable[State]) -> State:
    """The last state; the earlier ones are released on the way."""
    for state in states:
        last = state
        del state  # its memory can serve the next step
    return last


def _pairs(above: Tensor, below: Tensor, codec: Codec) -> Image.Image:
    """A grid with each image above another one."""
    columns = min(len(above), 16)
    rows = [half for pair in zip(above.split(columns), below.split(columns), strict=True) for half in pair]
    return image_grid(codec.decode(torch.cat(rows)), columns=columns)


def _save_grid(grid: Image.Image, folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    grid.save(folder / "grid.png")
    return [f"grid        {folder / 'grid.png'}"]

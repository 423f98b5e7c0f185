"""What the door for sampling can make of a trained run: new images, paths between them, and edits of given ones."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from src.app.assemble import source_of
from src.app.load import LoadedRun
from src.data.source import ImageSet
from src.data.transforms import to_model_range, to_uint8
from src.diffusion.sampler import DDIM, Euler, PerImageNoise, Sampler, encode, last_image, renoise, slerp
from src.errors import UserError
from src.generation.pictures import animation, image_grid, read_images, save_images
from src.generation.recipe import describe
from src.runs.files import file_sha256, write_json


class Task(ABC):
    """Something to draw with a trained run.

    Attributes:
        from_noise: whether images begin as noise alone, not as images of the data.
    """

    from_noise = True

    @abstractmethod
    def run(self, loaded: LoadedRun, n: int, batch_size: int, folder: Path) -> list[str]:
        """Draws.

        Args:
            loaded: the denoiser and the recipe.
            n: how many.
            batch_size: images made at once, where they can be many.
            folder: where files go.

        Returns:
            Lines that say what is where.

        Raises:
            ValueError: a number of the task's is impossible with this recipe.
            UserError: the recipe does not do for the task.
        """


GRID = 1024
"""Most images of a grid."""


class Draw(Task):
    """New images: a grid, the single images and, on request, an animation of the denoising.

    A drawing that was killed is finished with the bytes that it would have had: batches of which all images are there
    are not made again, if they are of the same weights and recipe.

    Args:
        gif: also the animation, of the first 64 images.
    """

    def __init__(self, gif: bool = False):
        self.gif = gif

    def run(self, loaded, n, batch_size, folder):
        batches = [range(first, min(first + batch_size, n)) for first in range(0, n, batch_size)]
        continued = _same_origin(loaded, batch_size, folder)
        shown: list[Tensor] = []
        for numbers in track(batches, description="sampling", transient=True):
            # the last is always made: it counts the network's evaluations
            redo = not continued or numbers == batches[-1]
            images = None if redo else read_images(folder / "images", numbers)
            if images is None:
                (images,) = loaded.generation.images(loaded.denoiser, numbers, batch_size)
                save_images(images, folder / "images", first=numbers.start)
            shown.extend(images[: GRID - len(shown)].cpu())
        lines = _save_grid(image_grid(torch.stack(shown)), folder)
        lines.append(f"images      {folder / 'images'} ({n})")
        if self.gif:
            states = loaded.generation.trajectory(loaded.denoiser, range(min(n, 64)))
            states = track(states, description="animation", total=loaded.generation.steps + 1, transient=True)
            animation(states).save(folder / "denoising.gif")
            lines.append(f"animation   {folder / 'denoising.gif'}")
        return lines


class Trajectory(Task):
    """The way from noise to image: a row for each image, its x_t above and the estimate of x0 below.

    Args:
        columns: how many states are shown, evenly over the steps.
    """

    def __init__(self, columns: int = 10):
        if columns < 2:
            raise ValueError(f"columns must be at least 2, got {columns}")
        self.columns = columns

    def run(self, loaded, n, batch_size, folder):
        generation = loaded.generation
        states = list(generation.counted(generation.trajectory(loaded.denoiser, range(n))))[1:]
        places = torch.linspace(0, len(states) - 1, min(self.columns, len(states))).round().long().unique()
        shown = [states[place] for place in places.tolist()]
        noisy, clean = (
            torch.stack(rows, dim=1) for rows in ([s.x for s in shown], [s.prediction.x0 for s in shown])
        )
        strips = torch.stack([noisy, clean], dim=1).flatten(0, 2)
        return _save_grid(image_grid(to_uint8(strips).cpu(), columns=len(shown)), folder)


class Interpolate(Task):
    """Rows of images between two latents, by spherical interpolation (Song et al. 2021, sec. 5.3).

    The first and the last image of row j are those that `Draw` gives the numbers 2j and 2j + 1; where images have
    labels, a row has its first image's, and only the first is.

    Args:
        columns: images of a row, at least 2.
    """

    def __init__(self, columns: int = 9):
        if columns < 2:
            raise ValueError(f"columns must be at least 2, got {columns}")
        self.columns = columns

    def run(self, loaded, n, batch_size, folder):
        generation, denoiser = loaded.generation, loaded.denoiser
        noise, ends, labels = generation.start(denoiser, range(2 * n))
        weights = torch.linspace(0, 1, self.columns, dtype=torch.float64)
        rows = torch.stack([slerp(ends[0::2], ends[1::2], float(w)) for w in weights], dim=1)
        labels = None if labels is None else labels[0::2].repeat_interleave(self.columns)
        # the ends go on with the noise that they started from, as in `Draw`; each image between has its own
        of_rows = PerImageNoise(generation.seed, range(n * self.columns), "interpolation")
        of_rows.generators[:: self.columns] = noise.generators[0::2]
        of_rows.generators[self.columns - 1 :: self.columns] = noise.generators[1::2]
        times = generation.times(denoiser.schedule)
        states = generation.sampler.trajectory(
            generation.around(denoiser), rows.flatten(0, 1), times, labels, of_rows
        )
        x = last_image(generation.counted(states))
        return _save_grid(image_grid(to_uint8(x).cpu(), columns=self.columns), folder)


class Reconstruct(Task):
    """Images of the data, encoded by DDIM inversion and decoded again (Song et al. 2021, sec. 5.4).

    The grid holds each image above its reconstruction.

    Args:
        split: of the data.
        tolerance: solve each step of the inversion to this accuracy; null for one evaluation a step.
    """

    from_noise = False

    def __init__(
        self, split: Literal["train", "validation", "test"] = "test", tolerance: float | None = None
    ):
        self.split = split
        self.tolerance = tolerance

    def run(self, loaded, n, batch_size, folder):
        generation, denoiser = loaded.generation, loaded.denoiser
        if not _is_deterministic_ddim(generation.sampler):
            raise UserError(
                f"task=reconstruct encodes by DDIM inversion, which {describe(generation.sampler)} does not lead back:"
                " choose sampler=ddim sampler.eta=0, or sampler=euler without churn, which is the same method"
            )
        x0, labels = _data(loaded, self.split, range(n))
        times = generation.times(denoiser.schedule)
        for state in track(
            encode(denoiser, x0, times, labels, self.tolerance),
            description="encoding",
            total=len(times),
            transient=True,
        ):
            x_T, spent = state.x, state.evaluations
        # without clipping, as it was encoded
        states = generation.sampler.trajectory(denoiser, x_T, times, labels)
        again = last_image(generation.counted(states, before=spent))
        error = (again - x0).square().mean().sqrt().item()
        pairs = torch.stack([x0, again], dim=1)
        columns = min(n, 16)
        rows = [half for part in pairs.split(columns) for half in (part[:, 0], part[:, 1])]
        lines = _save_grid(image_grid(to_uint8(torch.cat(rows)).cpu(), columns=columns), folder)
        return [*lines, f"error       {error:.4g} (root mean square, images in [-1, 1])"]


class ImageToImage(Task):
    """Images of the data, noised part of the way and denoised from there (SDEdit, Meng et al. 2022).

    The grid holds each image above what became of it.

    Args:
        strength: the share of the steps that is taken, in (0, 1]; 1 keeps least of the image.
        split: of the data.
    """

    from_noise = False

    def __init__(self, strength: float = 0.5, split: Literal["train", "validation", "test"] = "test"):
        self.strength = strength
        self.split = split

    def run(self, loaded, n, batch_size, folder):
        generation, denoiser = loaded.generation, loaded.denoiser
        x0, labels = _data(loaded, self.split, range(n))
        noise = PerImageNoise(generation.seed, range(n))
        x_t, times = renoise(denoiser, x0, generation.times(denoiser.schedule), self.strength, noise)
        states = generation.sampler.trajectory(generation.around(denoiser), x_t, times, labels, noise)
        x = last_image(generation.counted(states))
        columns = min(n, 16)
        rows = [half for pair in zip(x0.split(columns), x.split(columns), strict=True) for half in pair]
        return _save_grid(image_grid(to_uint8(torch.cat(rows)).cpu(), columns=columns), folder)


def _is_deterministic_ddim(sampler: Sampler) -> bool:
    """Whether the sampler is the method that `encode` inverts."""
    match sampler:
        case DDIM(eta=0) | Euler(s_churn=0):
            return True
    return False


def _same_origin(loaded: LoadedRun, batch_size: int, folder: Path) -> bool:
    """Whether the images in the folder are of these weights, recipe and batches; if not, they make room for those."""
    path = folder / "origin.json"
    recipe = {name: value for name, value in loaded.recipe().items() if name != "network_evaluations"}
    origin = {
        "checkpoint": file_sha256(loaded.found.checkpoint),
        "batch_size": batch_size,
        "device": next(loaded.denoiser.parameters()).device.type,
        **recipe,
    }
    try:
        if json.loads(path.read_text()) == origin:
            return True
    except (OSError, ValueError):
        pass
    for image in (folder / "images").glob("[0-9]*.png"):  # all, or they would pass for ours after a kill
        image.unlink()
    write_json(path, origin)
    return False


def _data(loaded: LoadedRun, split: str, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Images of the run's data in [-1, 1] on the denoiser's device, and their labels if the network takes them."""
    source = source_of(loaded.config)
    source.prepare()
    images: ImageSet = source.split(split)
    if len(indices) > len(images):
        raise UserError(f"n={len(indices)}: the {split} split has {len(images)} images; choose fewer")
    device = next(loaded.denoiser.parameters()).device
    chosen = torch.as_tensor(indices)
    labels = images.labels[chosen].to(device) if loaded.generation.num_classes else None
    return to_model_range(images.images(chosen)).to(device), labels


def _save_grid(grid: Image.Image, folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    grid.save(folder / "grid.png")
    return [f"grid        {folder / 'grid.png'}"]

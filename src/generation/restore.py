"""Tasks that make images from measurements or from low-resolution images: inpaint, deblur, upsample, superres."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from src.conditioning import Condition, LowResolution
from src.data.source import Split
from src.diffusion.denoiser import Wrapper
from src.diffusion.measurement import Blur, Downsample, Mask, Measurement, Operator, enlarged
from src.diffusion.restoration import PiGDM, RePaint, Restoration, jump_of
from src.diffusion.sampler import DDIM, PerImageNoise, Sampler
from src.errors import UserError
from src.generation.inputs import MASKS, Inputs, check_share, files_of, inputs_of, mask_files, masks_of
from src.generation.loaded import LoadedRun
from src.generation.pictures import image_rows, save_images
from src.generation.recipe import CLIPPING, kind_of
from src.generation.tasks import GRID, Made, Task, last_state, save_grid

FILLED = 128
"""Grey of pixels to fill, in grids."""


class Plan(NamedTuple):
    """How the images of a batch are made.

    Attributes:
        sampler: the sampler.
        wrappers: the wrappers of the denoiser, the innermost first.
        condition: what the network reads; None for nothing.
        shown: the measurement as images for the grid, floating point.
        measurement: the measurement, if the method uses one.
    """

    sampler: Sampler
    wrappers: Sequence[Wrapper]
    condition: Condition | None
    shown: Tensor
    measurement: Measurement | None = None


class FromImages(Task):
    """Makes an image from each input image; writes the single images, and a grid with input, measurement and result.

    Files may be fewer than n. With a class-conditional network, images of the data keep their class, and file i gets
    the class of image i of `draw`.

    Args:
        images: a file or a folder; None for images of `split`.
        split: the split of the data.
    """

    def __init__(self, images: str | None = None, split: Split = "test"):
        self.images, self.split = images, split
        self.own_condition = images is None
        if images is not None:
            files_of(images, "task.images")  # checks it

    def run(self, loaded, n, batch_size, folder):
        recipe, denoiser = loaded.recipe, loaded.denoiser
        if recipe.codec.shape != recipe.codec.image_shape:
            raise UserError("task: this task needs a network of pixels; choose a run with codec=pixels")
        inputs = self.inputs(loaded, n)
        n, times = len(inputs.images), recipe.times(denoiser.schedule)
        for old in (folder / "images").glob("[0-9]*"):
            old.unlink()
        shown, misfits, evaluations = [], [], 0
        for first in track(range(0, n, batch_size), description="sampling", transient=True):
            numbers = range(first, min(first + batch_size, n))
            made = self.plan(loaded, inputs, numbers)
            x_T, condition, noise = recipe.start(denoiser, numbers, made.condition)
            around = recipe.around(denoiser, made.wrappers)
            states = made.sampler.trajectory(around, x_T, times, condition, noise)
            last = last_state(states)
            images = self.finished(recipe.codec.decode(last.x).cpu(), inputs, numbers)
            save_images(images, folder / "images", first)
            shown.append((recipe.codec.decode(made.shown).cpu(), images))
            evaluations = max(evaluations, last.evaluations)
            if made.measurement is not None:
                misfits.append(made.measurement.residual(last.x).square().flatten(1).mean(dim=1).cpu())
        measured, images = (torch.cat(parts) for parts in zip(*shown, strict=True))
        rows = (
            [measured, images] if inputs.images.shape != images.shape else [inputs.images, measured, images]
        )
        lines = save_grid(image_rows(*(row[:GRID] for row in rows)), folder)
        lines.append(f"images      {folder / 'images'} ({n})")
        if not inputs.from_files:
            lines.append(f"psnr        {psnr(images, inputs.images):.2f} dB (mean over the images)")
        if misfits:
            misfit = torch.cat(misfits).mean().sqrt().item()
            lines.append(f"misfit      {misfit:.4g} (root mean square of y - A x0, images in [-1, 1])")
        record = {"inputs": inputs.record, "labels": inputs.describe_condition(recipe.conditioning)}
        return Made(lines, evaluations, record)

    def inputs(self, loaded: LoadedRun, n: int) -> Inputs:
        """The input images; checks the task against the run."""
        return inputs_of(loaded, self.images, self.split, n)

    @abstractmethod
    def plan(self, loaded: LoadedRun, inputs: Inputs, numbers: range) -> Plan:
        """How the images with these numbers are made."""

    def finished(self, images: Tensor, inputs: Inputs, numbers: range) -> Tensor:
        """The final bytes of generated images, uint8 (b, C, H, W)."""
        return images


class Restore(FromImages):
    """Makes images that fit a linear measurement with an unconditional or class-conditional network.

    Args:
        images: see `FromImages`.
        split: see `FromImages`.
        restoration: makes the method from the sampler and a measurement; None for the task's default.

    Attributes:
        kind: the kind of operator.
        default: the default method.
    """

    kind: ClassVar[type[Operator]]
    default: ClassVar[Callable[..., Restoration]]

    def __init__(
        self,
        images: str | None = None,
        split: Split = "test",
        restoration: Callable[..., Restoration] | None = None,
    ):
        super().__init__(images, split)
        self.restoration = restoration or type(self).default

    def prepare(self, steps: int) -> None:
        """Checks the restoration before a run is loaded, and sets what follows from the number of steps.

        Raises:
            ValueError: a number of the restoration is out of range.
            UserError: it needs more steps.
        """
        if kind_of(self.restoration) is RePaint:
            given = getattr(self.restoration, "keywords", {}).get("jump_length")
            self.restoration = partial(self.restoration, jump_length=jump_of(given, steps))
        self.restoration(DDIM(), None)  # checks its numbers

    def inputs(self, loaded, n):
        name = kind_of(self.restoration).__name__
        if self.kind not in kind_of(self.restoration).operators:
            raise UserError(
                f"restoration: {name} does not support this measurement; choose restoration=dps or pigdm"
            )
        conditioning = loaded.recipe.conditioning
        if conditioning is not None and "image" in conditioning.kinds:
            raise UserError(
                "task: this run's network reads a low-resolution image; choose task=superres, or another run"
            )
        try:
            self.restoration(loaded.recipe.sampler, None)
        except ValueError as error:
            if not str(error).startswith("sampler "):
                raise
            raise UserError(f"{error}; {name} needs sampler=ddpm, ddim or another single-step one") from None
        return inputs_of(loaded, self.images, self.split, n, self.shape(loaded.recipe.codec.image_shape))

    def shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of input files."""
        return image_shape

    def plan(self, loaded, inputs, numbers):
        x = loaded.recipe.codec.encode(inputs.images[numbers.start : numbers.stop].to(loaded.device))
        measurement, shown = self.measured(x, loaded, inputs, numbers)
        wrappers, outer = loaded.recipe.wrappers, {}
        if kind_of(self.restoration).inside_clipping:
            outer["outer"] = [wrap for wrap in wrappers if kind_of(wrap) in CLIPPING]
            wrappers = [wrap for wrap in wrappers if kind_of(wrap) not in CLIPPING]
        sampler = self.restoration(loaded.recipe.sampler, measurement, **outer)
        return Plan(sampler, wrappers, inputs.condition_of(loaded, numbers, x), shown, measurement)

    @abstractmethod
    def measured(
        self, x: Tensor, loaded: LoadedRun, inputs: Inputs, numbers: range
    ) -> tuple[Measurement, Tensor]:
        """The measurement, and images that show it; x are the encoded inputs."""


class Inpaint(Restore):
    """Fills the masked pixels. The known pixels of the written images are the bytes of the input.

    Args:
        mask: a file, or a folder with a file for each image: white is filled, black is kept, divided at half white. Or
            a generated mask: box (in the centre), right (the columns at the right), random (pixels).
        share: share of a generated mask's pixels that is filled, in (0, 1].
        images: see `FromImages`.
        split: see `FromImages`.
        restoration: see `Restore`.

    Raises:
        ValueError: share is out of range.
        UserError: there is no such mask.
    """

    kind = Mask
    default = partial(RePaint, jump_length=None, n_resample=10)

    def __init__(
        self,
        mask: str = "box",
        share: float = 0.25,
        images: str | None = None,
        split: Split = "test",
        restoration: Callable[..., Restoration] | None = None,
    ):
        super().__init__(images, split, restoration)
        self.mask, self.share = mask, share
        check_share(share)
        if mask not in MASKS:
            mask_files(mask)  # checks it

    def inputs(self, loaded, n):
        if self.images is not None:
            n = min(n, len(files_of(self.images, "task.images")))
        shape, seed = loaded.recipe.codec.image_shape, loaded.recipe.seed
        filled, record = masks_of(self.mask, self.share, shape, seed, n)  # before any image is read
        inputs = super().inputs(loaded, n)
        return inputs._replace(filled=filled, record={**inputs.record, "mask": record})

    def measured(self, x, loaded, inputs, numbers):
        known = ~inputs.filled[numbers.start : numbers.stop].to(x.device)
        y = x * known
        return Measurement(Mask(known), y), torch.where(known, y, FILLED / 127.5 - 1)

    def finished(self, images, inputs, numbers):
        some = slice(numbers.start, numbers.stop)
        return torch.where(inputs.filled[some], images, inputs.images[some])


class Noisy(Restore):
    """A measurement with noise. Files are measurements; images of the data are measured.

    Args:
        noise: standard deviation of the measurement's noise, with images in [-1, 1]; at least 0.
        images: see `FromImages`.
        split: see `FromImages`.
        restoration: see `Restore`.

    Raises:
        ValueError: noise is negative.
    """

    default = partial(PiGDM, data_std=1.0)

    def __init__(
        self,
        noise: float = 0.01,
        images: str | None = None,
        split: Split = "test",
        restoration: Callable[..., Restoration] | None = None,
    ):
        super().__init__(images, split, restoration)
        if noise < 0:
            raise ValueError(f"noise must be at least 0, got {noise}")
        self.noise = noise

    @abstractmethod
    def operator(self) -> Operator:
        """The operator."""

    def measured(self, x, loaded, inputs, numbers):
        operator = self.operator()
        y = x
        if not inputs.from_files:
            y = operator(x)
            y = y + self.noise * PerImageNoise(loaded.recipe.seed, numbers, "measurement")(y)
        return Measurement(operator, y, self.noise), self.shown(y)

    def shown(self, y: Tensor) -> Tensor:
        """Measurements as images of the run's size."""
        return y


class Deblur(Noisy):
    """Removes a Gaussian blur of known width.

    Args:
        std: standard deviation of the blur in pixels, above 0.
        noise: see `Noisy`; above 0 for restoration=pigdm.
        images: blurred files; see `FromImages`.
        split: see `FromImages`.
        restoration: see `Restore`.

    Raises:
        ValueError: std is not positive, or noise is negative.
    """

    kind = Blur

    def __init__(
        self,
        std: float = 1.0,
        noise: float = 0.01,
        images: str | None = None,
        split: Split = "test",
        restoration: Callable[..., Restoration] | None = None,
    ):
        super().__init__(noise, images, split, restoration)
        Blur(std)  # checks it
        self.std = std
        if noise == 0 and kind_of(self.restoration) is PiGDM:
            raise ValueError("noise must be above 0 for restoration=pigdm, since a blur cannot be inverted")

    def operator(self):
        return Blur(self.std)


class Upsample(Noisy):
    """Enlarges images with a network that was not trained for it; `SuperResolution` uses one that was.

    Args:
        factor: files are smaller than the run's images by this factor.
        noise: see `Noisy`.
        images: small files; see `FromImages`.
        split: see `FromImages`.
        restoration: see `Restore`.

    Raises:
        ValueError: factor is below 2 or does not divide the run's images, or noise is negative.
    """

    kind = Downsample

    def __init__(
        self,
        factor: int = 2,
        noise: float = 0.01,
        images: str | None = None,
        split: Split = "test",
        restoration: Callable[..., Restoration] | None = None,
    ):
        super().__init__(noise, images, split, restoration)
        if factor < 2:
            raise ValueError(f"factor must be at least 2, got {factor}")
        self.factor = factor

    def shape(self, image_shape):
        channels, height, width = image_shape
        if height % self.factor or width % self.factor:
            raise ValueError(f"factor={self.factor} must divide the run's images, {height} x {width}")
        return channels, height // self.factor, width // self.factor

    def operator(self):
        return Downsample(self.factor)

    def shown(self, y):
        return enlarged(y, self.factor)


class SuperResolution(FromImages):
    """Enlarges images with a network that was trained with conditioning=low_resolution (Saharia et al. 2021).

    Args:
        images: small files; see `FromImages`. Images of the data are made small first.
        split: see `FromImages`.
    """

    def inputs(self, loaded, n):
        conditioning = loaded.recipe.conditioning
        if not isinstance(conditioning, LowResolution):
            raise UserError(
                "task=superres needs a run trained with conditioning=low_resolution; choose such a run, or"
                " task=upsample, which takes runs on pixels without it"
            )
        channels, height, width = loaded.recipe.codec.image_shape
        small = (channels, height // conditioning.factor, width // conditioning.factor)
        return inputs_of(loaded, self.images, self.split, n, small)

    def plan(self, loaded, inputs, numbers):
        conditioning = loaded.recipe.conditioning
        x = loaded.recipe.codec.encode(inputs.images[numbers.start : numbers.stop].to(loaded.device))
        low = x if inputs.from_files else conditioning.low(x)
        condition = conditioning.of_low(low)
        recipe = loaded.recipe
        return Plan(recipe.sampler, recipe.wrappers, condition, enlarged(low, conditioning.factor))


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, 20 log10(255 / RMSE) of each image, and then the mean; equal images have 100.

    Args:
        a, b: uint8, shape (B, C, H, W).
    """
    errors = (a.double() - b.double()).square().flatten(1).mean(dim=1)
    return (10 * (255**2 / errors.clamp(min=255**2 / 1e10)).log10()).mean().item()

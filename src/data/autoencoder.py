"""Latents of an autoencoder of diffusers, cached on disk."""

import hashlib
import json
import logging
import math
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from rich.progress import track
from torch import Tensor
from typing_extensions import TypedDict

from src.data.codec import Codec, Pixels
from src.data.source import CACHE, ImageSet, ImageSource, Split, user_path
from src.data.tensor_cache import cached
from src.errors import UserError

log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
CACHE_VERSION = 1


class Sizes(TypedDict):
    """What is read of an autoencoder's config.json."""

    in_channels: int
    latent_channels: int
    block_out_channels: list[int]
    scaling_factor: float
    shift_factor: float | None


# diffusers' values of keys that a config.json lacks; those of early versions have no scaling_factor.
DEFAULTS: Sizes = {
    "in_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [64],
    "scaling_factor": 0.18215,
    "shift_factor": None,
}


class LatentImages(ImageSet):
    """A set of images as latents.

    Args:
        inner: the images, which give labels, captions and the fingerprint.
        latents: float, shape (n, *codec.shape).
        mirrored: the latents of the mirrored images; None if they are not needed.
    """

    def __init__(self, inner: ImageSet, latents: Tensor, mirrored: Tensor | None):
        self.inner, self.latents, self._mirrored = inner, latents, mirrored
        self.labels, self.captions, self.text = inner.labels, inner.captions, inner.text

    def __len__(self) -> int:
        return len(self.latents)

    def images(self, indices):
        return self.latents.index_select(0, torch.as_tensor(indices, dtype=torch.int64)).float()

    def mirrored(self, indices, images):
        if self._mirrored is None:
            raise ValueError("the mirrored images were not encoded")
        return self._mirrored.index_select(0, torch.as_tensor(indices, dtype=torch.int64)).float()

    def fingerprint(self):
        return self.inner.fingerprint()


class AutoencoderKL(Codec):
    """The latents of diffusers' `AutoencoderKL`, from a local folder (Rombach et al. 2022, arXiv:2112.10752).

    x = (mean of the encoder's Gaussian - shift) scale. Each image of a data set, and its mirror image where the
    training flips, is encoded once; latents are cached with their statistics, the scale and the encoder's hash.
    A run stores hash and scale, and is refused with another autoencoder.

    Args:
        image_shape: (C, H, W) of the images.
        folder: config.json and its weights as safetensors, e.g. the folder vae/ of a pipeline.
        sha256: hash of the autoencoder, which a training fills in; another autoencoder is refused.
        scale: factor of the latents; None for that of the autoencoder.
        shift: subtracted before scaling; None for that of the autoencoder, or 0.
        batch: images that are encoded or decoded at once.
        precision: of the cached latents.
        cache: folder of the cached latents.

    Raises:
        UserError: the folder or the package is missing, or the autoencoder is another one or does not fit the images.
    """

    bounded = False

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        folder: str,
        sha256: str | None = None,
        scale: float | None = None,
        shift: float | None = None,
        batch: int = 16,
        precision: str = "float32",
        cache: str = CACHE,
    ):
        if precision not in ("float32", "float16"):
            raise ValueError(f"precision must be float32 or float16, got {precision!r}")
        if batch < 1:
            raise ValueError(f"batch must be at least 1 image, got {batch}")
        if find_spec("diffusers") is None:
            raise UserError("codec=autoencoder_kl needs the package diffusers: pip install -e '.[latent]'")
        self.folder = user_path(folder, "codec.folder")
        config = self._read(folder)
        self.sha256 = _digest([_file_digest(self.folder / name) for name in (CONFIG, WEIGHTS)])
        self.scale = float(config["scaling_factor"] if scale is None else scale)
        self.shift = float((config["shift_factor"] or 0.0) if shift is None else shift)
        if not 0 < self.scale < math.inf or not math.isfinite(self.shift):
            raise ValueError(f"scale must be above 0 and shift finite, got {self.scale:g} and {self.shift:g}")
        if sha256 not in (None, self.sha256):
            raise UserError(
                f"codec.folder={folder}: this autoencoder ({self.sha256[:12]}) is not that of the run's latents"
                f" ({sha256[:12]}); name the folder that holds it with codec.folder=..."
            )
        channels, height, width = image_shape
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        if channels != config["in_channels"]:
            raise UserError(
                f"codec.folder={folder}: the autoencoder takes images of {config['in_channels']} channels, and these"
                f" have {channels}; choose data.channels={config['in_channels']}, or other data"
            )
        if height % factor or width % factor:
            raise UserError(
                f"codec.folder={folder}: the autoencoder divides sides by {factor}, and the images have {height} x"
                f" {width} pixels; choose data.image_size as a multiple of {factor}"
            )
        self.image_shape = tuple(image_shape)
        self.shape = (config["latent_channels"], height // factor, width // factor)
        self.batch, self.precision, self.cache = batch, precision, cache
        self.device = torch.device("cpu")
        self.pixels = Pixels(self.image_shape)

    def _read(self, folder: str) -> "Sizes":
        for name in (CONFIG, WEIGHTS):
            if not (self.folder / name).is_file():
                raise UserError(
                    f"codec.folder={folder}: no {name} in it; name the folder of an AutoencoderKL, e.g. one that"
                    " python -m src.export wrote of an autoencoder's run"
                )
        try:
            config = json.loads((self.folder / CONFIG).read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"codec.folder={folder}: {CONFIG} cannot be read as JSON ({error})") from None
        kind = config.get("_class_name") if isinstance(config, dict) else None
        if kind != "AutoencoderKL":
            raise UserError(f"codec.folder={folder}: it holds {kind}, not AutoencoderKL")
        try:
            return TypeAdapter(Sizes).validate_python({**DEFAULTS, **config})
        except ValidationError as error:
            first = error.errors()[0]
            wrong = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
            raise UserError(f"codec.folder={folder}: config.json: {wrong}") from None

    @cached_property
    def network(self) -> Any:
        """diffusers' autoencoder, on the CPU until `to`."""
        from diffusers import AutoencoderKL as Network

        try:
            options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
            options["low_cpu_mem_usage"] = False  # without a warning where accelerate is not installed
            found, loaded = Network.from_pretrained(self.folder, **options)
        except Exception as error:  # of several packages
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
            raise UserError(f"codec.folder={self.folder}: diffusers cannot load it ({reason})") from None
        if unfit := sorted(loaded["missing_keys"]) + sorted(
            loaded["unexpected_keys"]
        ):  # diffusers only warns
            raise UserError(
                f"codec.folder={self.folder}: {WEIGHTS} does not fit {CONFIG} in {len(unfit)} weights, e.g. {unfit[0]};"
                " name an intact folder"
            )
        return found.float().eval().requires_grad_(False).to(self.device)

    def to(self, device):
        self.device = torch.device(device)
        if "network" in vars(self):
            self.network.to(self.device)
        return self

    def pinned(self):
        return {"sha256": self.sha256, "scale": self.scale, "shift": self.shift}

    @torch.no_grad()
    def encode(self, images):
        if images.is_floating_point():  # latents of `encoded`
            return images
        pixels = self.pixels.encode(images)
        parts = [self.network.encode(part).latent_dist.mode() for part in pixels.split(self.batch)]
        return (torch.cat(parts) - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, x):
        latents = x.float() / self.scale + self.shift
        parts = [self.network.decode(part).sample for part in latents.split(self.batch)]
        return self.pixels.decode(torch.cat(parts))

    def describe(self):
        numbers = f"scale {self.scale:g}, shift {self.shift:g}"
        return f"AutoencoderKL {self.sha256[:12]} ({numbers}), {self.pixels.describe()}"

    def encoded(self, source: ImageSource, split: Split) -> ImageSet:
        images = source.split(split)
        flips = split == "train" and source.horizontal_flip
        if len(images) == 0:
            return images
        key = [
            CACHE_VERSION,
            self.sha256,
            self.scale,
            self.shift,
            self.precision,
            source.fingerprint(split),
            flips,
        ]
        path = user_path(self.cache, "codec.cache") / f"latents_{_digest(key)[:32]}.safetensors"
        found = cached(path, lambda: self._all(images, flips, f"encoding {split}"))
        stored = json.loads(bytes(found["origin"].tolist()))
        if stored != self._origin():  # of a file that was renamed
            raise UserError(f"{path}: its latents are of another autoencoder or scale; delete it")
        log.info("latents     %s: mean %s, std %s", split, *(_short(found[name]) for name in ("mean", "std")))
        spread = (
            (found["std"].square() + (found["mean"] - found["mean"].mean()).square()).mean().sqrt().item()
        )
        if split == "train" and not 0.5 < spread < 2:
            log.warning(
                "codec.scale=%.4g: the latents have a standard deviation of %.3g, and schedules assume about 1; choose"
                " codec.scale=%.4g",
                *(self.scale, spread, self.scale / max(spread, 1e-12)),
            )
        return LatentImages(images, found["latents"], found.get("mirrored"))

    def _origin(self) -> dict[str, Any]:
        return json.loads(json.dumps(self.pinned()))

    def _all(self, images: ImageSet, flips: bool, description: str) -> dict[str, Tensor]:
        """The latents of a set, with their statistics and origin."""
        before = self.device
        self.to(torch.accelerator.current_accelerator(check_available=True) or before)

        def through(change: Callable[[Tensor], Tensor], what: str) -> Tensor:
            starts = range(0, len(images), self.batch)
            parts = [
                self.encode(
                    change(images.images(range(i, min(i + self.batch, len(images))))).to(self.device)
                ).cpu()
                for i in track(starts, description=what, transient=True)
            ]
            return torch.cat(parts).to(getattr(torch, self.precision))

        made = {"latents": through(lambda x: x, description)}
        if flips:
            made["mirrored"] = through(lambda x: x.flip(-1), f"{description}, mirrored")
        self.to(before)
        values = made["latents"].double().movedim(1, 0).flatten(1)
        origin = torch.tensor(list(json.dumps(self.pinned()).encode()), dtype=torch.uint8)
        return made | {"mean": values.mean(1), "std": values.std(1, correction=0), "origin": origin}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(values: Tensor) -> str:
    return " ".join(f"{value:.3g}" for value in values.tolist())

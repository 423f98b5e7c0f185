"""The export of a trained autoencoder: a folder for `codec=autoencoder_kl` and diffusers."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from omegaconf import DictConfig
from rich.progress import track

from src.app.build import class_of
from src.app.load import pick_device, with_choices
from src.app.restore import Restored, config_of, load_weights, parts_of
from src.data.autoencoder import AutoencoderKL
from src.data.source import SPLITS, ImageSet
from src.diffusion.loss import ReconstructionLoss
from src.diffusion.loss.reconstruction import psnr
from src.errors import UserError
from src.generation.pictures import image_rows
from src.runs.files import file_sha256
from src.runs.folder import FoundRun, find_run
from src.training.reading import read_checkpoint

log = logging.getLogger(__name__)

MOST, PICTURED, BATCH = 10_000, 16, 64
PICTURE = "reconstructions.png"


@dataclass(frozen=True)
class TrainedAutoencoder:
    """An autoencoder in float32 with the chosen weights, its data, and what its model card says of the training."""

    parts: Restored
    found: FoundRun
    device: torch.device
    loss: str
    protocol: dict[str, str | int]


def load_autoencoder(config: DictConfig) -> TrainedAutoencoder | None:
    """The autoencoder of the run that conf/export.yaml names; None if the run is another one.

    Raises:
        UserError: there is no such run.
    """
    found = find_run(config.run, config.checkpoint)
    content = read_checkpoint(found.checkpoint)
    own = config_of(content, found, config.conditioning.encoder.name, config.codec.folder)
    if not issubclass(class_of(own.loss) or object, ReconstructionLoss):
        return None
    parts = parts_of(with_choices(own, {}, config.data))
    weights, _ = load_weights(parts.denoiser, found, content, own, config.weights)
    protocol = {
        "checkpoint_sha256": file_sha256(found.checkpoint),
        "training_steps": content["global_step"],
        "weights": weights,
    }
    distance = str(own.distance._target_).rpartition(".")[2]
    loss = f"the {distance.lower()} error of the pixels and a KL term of weight {own.loss.kl_weight:g}"
    return TrainedAutoencoder(parts, found, pick_device(config.device), loss, protocol)


def write_autoencoder(trained: TrainedAutoencoder, folder: Path, out: Path) -> tuple[str, str]:
    """Writes weights, config.json and a picture of reconstructions into a folder that will lie at `out`.

    The scale is 1/std and the shift the mean of the latents of training images (at most 10,000, evenly spaced); mean
    squared error and PSNR are those of held-out images, with bytes in [0, 1].

    Returns:
        How to use it, and its model card.

    Raises:
        UserError: the latents of all images are the same.
    """
    source, network = trained.parts.source, trained.parts.denoiser.network.module.float()
    source.prepare()
    network.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    network.save_pretrained(folder, safe_serialization=True)
    codec = AutoencoderKL(source.image_shape, str(folder), batch=BATCH).to(trained.device)
    images = source.split("train")
    chosen = evenly(len(images), MOST)
    latents = [
        codec.encode(images.images(part).to(trained.device)).cpu()
        for part in track(chosen.split(BATCH), description="encoding train", transient=True)
    ]
    values = torch.cat(latents).double()
    std, mean = torch.std_mean(values, correction=0)
    if not std > 0:
        raise UserError(
            f"run={trained.found.folder}: all images have the same latents; train it longer, or with a smaller"
            " loss.kl_weight"
        )
    network.register_to_config(scaling_factor=1 / std.item(), shift_factor=mean.item())
    network.save_config(folder)
    codec = AutoencoderKL(source.image_shape, str(folder), batch=BATCH).to(trained.device)
    split = next(split for split in reversed(SPLITS) if len(source.split(split)))
    errors = reconstruct(codec, source.split(split), folder / PICTURE)
    shape, of_images = (" x ".join(map(str, s)) for s in (codec.shape, codec.image_shape))
    spread = ", ".join(f"{value:.3g}" for value in values.std((0, 2, 3), correction=0))
    measured = (
        f"mean squared error {errors.mean():.3g}, PSNR {psnr(errors).mean():.2f} dB, of {len(errors):,} images of the"
        f" {split} split"
    )
    log.info("latents     %s, std by channel %s, scaling_factor %.4g", shape, spread, codec.scale)
    log.info("error       %s", measured)
    usage = f"  python -m src.train codec=autoencoder_kl codec.folder={out} data=..."
    head = yaml.safe_dump(
        {"library_name": "diffusers", "tags": ["autoencoder", "latent-diffusion"]}, sort_keys=False
    )
    protocol = {**trained.protocol, "autoencoder_sha256": codec.sha256, "images_of_scale": len(values)}
    return usage, CARD.format(
        head=head,
        data=type(source).__name__,
        parameters=sum(p.numel() for p in network.parameters()),
        protocol=json.dumps(protocol, indent=2),
        **{"out": out, "shape": shape, "of_images": of_images, "loss": trained.loss, "picture": PICTURE},
        **{"measured": measured, "spread": spread, "scale": codec.scale, "shift": codec.shift},
    )


def reconstruct(codec: AutoencoderKL, images: ImageSet, picture: Path) -> torch.Tensor:
    """Writes a picture of images above their reconstructions.

    Returns:
        The mean squared error of each image (at most 10,000, evenly spaced), bytes / 255, float64, shape (n,).
    """
    errors = []
    for part in track(evenly(len(images), MOST).split(BATCH), description="reconstructing", transient=True):
        originals = images.images(part)
        made = codec.decode(codec.encode(originals.to(codec.device))).cpu()
        errors.append(((made.double() - originals.double()) / 255).square().flatten(1).mean(dim=1))
    originals = images.images(evenly(len(images), PICTURED))
    made = codec.decode(codec.encode(originals.to(codec.device))).cpu()
    image_rows(originals, made, columns=PICTURED).save(picture)
    return torch.cat(errors)


def evenly(n: int, most: int) -> torch.Tensor:
    """At most so many of n indices, evenly spaced, int64."""
    return torch.linspace(0, n - 1, min(n, most), dtype=torch.float64).long()


CARD = """\
---
{head}---

# AutoencoderKL, {parameters:,} parameters

An autoencoder of {data}: images of {of_images} from latents of {shape}. It was trained with {loss}, without a
perceptual or an adversarial term, so that details which the latents do not hold are blurred.

![Images above their reconstructions]({picture})

Reconstruction from the mean of the latents: {measured}.

## Use

```sh
python -m src.train codec=autoencoder_kl codec.folder={out} data=...
```

```python
from diffusers import AutoencoderKL

autoencoder = AutoencoderKL.from_pretrained("{out}")
latents = autoencoder.encode(images).latent_dist.mean  # images in [-1, 1]
images = autoencoder.decode(latents).sample
```

## Latents

(mean - {shift:.6g}) {scale:.6g} has mean 0 and standard deviation 1 on training images; `config.json` holds both
numbers as `shift_factor` and `scaling_factor`. Standard deviation by channel before scaling: {spread}.

## Protocol

```json
{protocol}
```
"""

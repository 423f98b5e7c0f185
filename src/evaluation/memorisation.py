"""Does a run copy its training images? `metrics=memorisation` of `src.evaluate`."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from tqdm import tqdm

from src.data.source import ImageSet, Split
from src.errors import UserError
from src.evaluation.record import Record
from src.generation.loaded import LoadedRun
from src.generation.pictures import image_rows
from src.metrics.features import FeatureExtractor
from src.metrics.memorisation import (
    attraction,
    copy_ratio,
    copying_test,
    distinct,
    in_one_set,
    membership_test,
    nearest,
)
from src.randomness import generator

log = logging.getLogger(__name__)

BATCH = 512
SHOWN = 32
"""Images in the picture."""
PIXELS = "pixels"


class Memorisation:
    """Compares generated images with their nearest training and held-out images, in pixels and in a feature space.

    For each space:

    - `copied_<space>`: share of generated images whose nearest training image is nearer than `threshold` times the
      mean distance to the next `neighbours`; see `src.metrics.memorisation.copy_ratio`. `..._heldout` is the same
      share of held-out images, i.e. false alarms;
    - `membership_p_<space>`: p value of `membership_test`, and `membership_z_<space>`;
    - `copying_p_<space>`: p value of the data-copying test, `copying_test`, and its statistic, `copying_CT_<space>`;
    - `distance_train_<space>` and `distance_heldout_<space>`: mean distance of generated images to the nearest training
      and held-out image, where the larger of the two sets is reduced to the size of the other by a keyed draw;
    - `distance_heldout_train_<space>`: mean distance of held-out images to the nearest of all training images, and
      `distance_all_train_<space>` that of generated images.

    Pixels are in [0, 1]. Training images that are equal count once. The membership test leaves out images that are in
    both sets.

    Args:
        features: the feature space.
        held_out: the split that was not trained on.
        threshold: largest ratio of a copy; 1/3 in Yoon et al. 2023.
        neighbours: number of further neighbours in the ratio; 1 in Yoon et al. 2023.
        cells: cells of the data-copying test, from k-means of the training images in the feature space.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        features: FeatureExtractor,
        held_out: Split = "test",
        threshold: float = 1 / 3,
        neighbours: int = 1,
        cells: int = 5,
    ):
        if held_out == "train":
            raise ValueError("held_out=train: choose a split that is not trained on, test or validation")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
        for name, number in (("neighbours", neighbours), ("cells", cells)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.features = features
        self.held_out = held_out
        self.threshold = threshold
        self.neighbours = neighbours
        self.cells = cells

    def settings(self) -> dict[str, Any]:
        """The settings, for the protocol."""
        return {
            "held_out": self.held_out,
            "threshold": self.threshold,
            "neighbours": self.neighbours,
            "cells": self.cells,
        }


@dataclass(frozen=True)
class Images:
    """A set of images in both spaces.

    Attributes:
        pixels: uint8, shape (n, C, H, W).
        vectors: float32 by space, shape (n, d).
    """

    pixels: torch.Tensor
    vectors: dict[str, NDArray[np.float32]]

    def __len__(self) -> int:
        return len(self.pixels)


def embed(pixels: torch.Tensor, features: FeatureExtractor) -> Images:
    """Images uint8 (n, C, H, W) with their vectors; features are computed on the extractor's device."""
    device = next(features.parameters()).device
    batches = tqdm(pixels.split(BATCH), desc="memorisation: features", delay=2, leave=False)
    rows = [features(batch.to(device)).cpu() for batch in batches]
    flat = pixels.flatten(1).numpy().astype(np.float32) / 255
    return Images(pixels, {PIXELS: flat, features.name: torch.cat(rows).numpy()})


def compare(
    generated: Images, train: Images, held_out: Images, memorisation: Memorisation, seed: int = 0
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The scores, and for each generated image by space `ratio_<space>` and `nearest_<space>`, an index in `train`.

    Args:
        generated, train, held_out: the images.
        memorisation: the settings.
        seed: of the draw that reduces the larger set.
    """
    from sklearn.cluster import KMeans

    scores: dict[str, float] = {}
    curve: dict[str, list[float]] = {}
    first = distinct(train.pixels.numpy())
    compared, occurrences = in_one_set(train.pixels.numpy(), held_out.pixels.numpy())
    features = memorisation.features.name
    clusters = KMeans(min(memorisation.cells, max(1, len(first) // 20)), n_init=1, random_state=0)
    clusters.fit(train.vectors[features][first])
    cells = [clusters.predict(images.vectors[features]) for images in (generated, held_out)]
    fewest = min(len(first), len(held_out))
    kept = [
        torch.randperm(count, generator=generator(seed, "memorisation", k))[:fewest].numpy()
        for k, count in enumerate((len(first), len(held_out)))
    ]
    for space in train.vectors:
        ours, unseen = generated.vectors[space], held_out.vectors[space]
        seen = train.vectors[space][first]
        k = memorisation.neighbours + 1
        to_train, from_held_out = nearest(ours, seen, k), nearest(unseen, seen, k)
        among_all = nearest(ours, np.concatenate([train.vectors[space], unseen])[compared]).indices[:, 0]
        ratios = copy_ratio(to_train.distances)
        membership = membership_test(among_all, compared < len(train), occurrences)
        statistic, copying = copying_test(to_train.distances[:, 0], from_held_out.distances[:, 0], *cells)
        scores |= {
            f"copied_{space}": float((ratios < memorisation.threshold).mean()),
            f"copied_{space}_heldout": float(
                (copy_ratio(from_held_out.distances) < memorisation.threshold).mean()
            ),
            f"membership_p_{space}": membership.p,
            f"membership_z_{space}": membership.z,
            f"copying_p_{space}": copying.p,
            f"copying_CT_{space}": statistic,
            f"distance_train_{space}": float(nearest(ours, seen[kept[0]]).distances.mean()),
            f"distance_heldout_{space}": float(nearest(ours, unseen[kept[1]]).distances.mean()),
            f"distance_all_train_{space}": float(to_train.distances[:, 0].mean()),
            f"distance_heldout_train_{space}": float(from_held_out.distances[:, 0].mean()),
        }
        curve[f"ratio_{space}"] = ratios.tolist()
        curve[f"nearest_{space}"] = first[to_train.indices[:, 0]].tolist()
    return scores, curve


def most_attractive(curve: dict[str, list[float]], count: int) -> dict[str, list[float]]:
    """`attractive_<space>`: the training images to which generated images are drawn most, at most `SHOWN` of them."""
    found = {}
    for name in [name.removeprefix("ratio_") for name in curve if name.startswith("ratio_")]:
        indices = np.array(curve[f"nearest_{name}"], dtype=np.int64)
        drawn = attraction(np.array(curve[f"ratio_{name}"]), indices, count)
        order = np.argsort(-drawn, kind="stable")[:SHOWN]
        found[f"attractive_{name}"] = order[drawn[order] > 0].tolist()
    return found


def picture(generated: Images, train: Images, held_out: Images, ratios: NDArray, shown: int = SHOWN) -> Image:
    """The images with the smallest ratio in pixels: in each column the image, and below it the nearest training and the
    nearest held-out image."""
    chosen = np.argsort(ratios, kind="stable")[:shown]
    ours = generated.vectors[PIXELS][chosen]
    rows = [generated.pixels[chosen]]
    for images in (train, held_out):
        rows.append(images.pixels[nearest(ours, images.vectors[PIXELS]).indices[:, 0]])
    return image_rows(*rows)


def score_memorisation(
    loaded: LoadedRun, memorisation: Memorisation, n: int, batch_size: int, seed: int
) -> tuple[Record, Image]:
    """Generates n images and compares them with all training and held-out images.

    Args:
        loaded: the trained run.
        memorisation: the settings.
        n: number of generated images.
        batch_size: images per network call.
        seed: of the draw that reduces the larger set; the images have the recipe's seed.

    Returns:
        The record, and the picture of the images that are most like a copy.

    Raises:
        UserError: too few images, or images that the feature space does not take.
    """
    if n < 2:
        raise UserError(f"n={n}: memorisation needs at least 2 images")
    source, features = loaded.source, memorisation.features.to(loaded.device)
    source.prepare()
    try:
        features(torch.zeros(1, *source.image_shape, dtype=torch.uint8, device=loaded.device))
    except ValueError as error:
        raise UserError(f"metrics: {error}") from None
    trained, held_out = (_all(source.split(split)) for split in ("train", memorisation.held_out))
    if len(held_out) < 2:
        raise UserError(
            f"metrics.held_out={memorisation.held_out}: this split has {len(held_out)} images; choose another split,"
            " or data with held-out images"
        )
    both = (trained, held_out, torch.cat([trained, held_out]))
    different, different_held_out, of_both = (len(distinct(pixels.numpy())) for pixels in both)
    if different <= memorisation.neighbours + 1:
        raise UserError(
            f"metrics.neighbours={memorisation.neighbours}: there are {different} different training images; choose"
            " fewer neighbours"
        )
    in_both = different + different_held_out - of_both
    if in_both == different_held_out:
        raise UserError(
            f"metrics.held_out={memorisation.held_out}: all images of this split are training images, too; choose"
            " another split, or data with held-out images"
        )
    made, evaluations = [], 0
    with tqdm(desc="memorisation: generating", total=n, unit="image", delay=2, leave=False) as progress:
        for batch in loaded.recipe.images(loaded.denoiser, range(n), batch_size):
            made.append(batch.images.cpu())
            evaluations = max(evaluations, batch.evaluations)
            progress.update(len(batch.images))
    generated, seen, unseen = (embed(pixels, features) for pixels in (torch.cat(made), trained, held_out))
    scores, curve = compare(generated, seen, unseen, memorisation, seed)
    protocol = {
        "memorisation": memorisation.settings(),
        "data": source.name,
        "train": {"images": len(trained), "distinct": different, "fingerprint": source.fingerprint("train")},
        "held_out": {
            "images": len(held_out),
            "distinct": different_held_out,
            "fingerprint": source.fingerprint(memorisation.held_out),
        },
        "in_both": in_both,
        "features": features.describe(),
        "num_images": n,
        "seed": seed,
        "recipe": loaded.record(evaluations),
        "quantisation": loaded.recipe.codec.describe(),
    }
    curve |= most_attractive(curve, len(trained))
    shown = picture(generated, seen, unseen, np.array(curve[f"ratio_{PIXELS}"]))
    return Record(scores, protocol, curve), shown


def _all(images: ImageSet) -> torch.Tensor:
    """All images of a set, uint8 (n, C, H, W)."""
    indices = range(len(images))
    return torch.cat([images.images(indices[k : k + BATCH]) for k in range(0, len(images), BATCH)])

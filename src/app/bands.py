"""Which reference band a training is compared with."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from src.app.build import resolve
from src.app.options import effect_of
from src.errors import UserError
from src.training.callbacks import ReferenceBands
from src.training.reference_bands import FOLDER, Band
from src.training.resume import flat

# Options on which losses depend, but whose effect is part of the band: it is over seeds, and the same for any length.
TOLERATED = ("seed", "trainer.max_steps")
# Options that change values of the band without being another experiment.
COMPARED = ("batch_size", "trainer.limit_val_batches")
# Options on which scores depend, besides those on which losses depend.
SCORING = ("metrics", "sampler", "spacing", "guidance", "clipping", "labels", "generation.seed", "wrappers")
SCORED = "callbacks.track_fidelity.n"


def recipe_of_losses(config: DictConfig) -> dict[str, Any]:
    """The options on which the losses of a training depend, flat, without those that a band tolerates."""
    options = flat(resolve(config, "config"))
    kept = {
        name: value
        for name, value in options.items()
        if effect_of(name) in ("tuning", "experiment") and name not in TOLERATED
    }
    return kept | {name: options.get(name) for name in COMPARED}


def recipe_of_scores(config: DictConfig) -> dict[str, Any]:
    """The options on which its scores depend besides, flat."""
    options = flat(resolve(config, "config"))
    return {
        name: value
        for name, value in options.items()
        if name == SCORED or any(name == each or name.startswith(f"{each}.") for each in SCORING)
    }


def bands_of(config: DictConfig, folder: Path) -> ReferenceBands | None:
    """The callback that compares a training with a band; None if no band has its recipe, with bands=none, or
    with bands=auto and init.

    Args:
        config: conf/train.yaml, composed.
        folder: the run's folder.

    Raises:
        UserError: bands names none of the bands, or its file is damaged.
    """
    names = sorted(path.stem for path in FOLDER.glob("*.json"))
    if config.bands == "none" or not names:
        return None
    if config.bands != "auto":
        if config.bands not in names:
            raise UserError(f"bands={config.bands}: choose auto, none, {', '.join(names)}")
        return _compared(config, folder, config.bands, Band.read(FOLDER / f"{config.bands}.json"))
    if config.init:
        return None  # the band is of trainings from random weights
    recipe = recipe_of_losses(config)
    for name in names:
        band = Band.read(FOLDER / f"{name}.json")
        if band.recipe == recipe:
            return _compared(config, folder, name, band)
    return None


def _compared(config: DictConfig, folder: Path, name: str, band: Band) -> ReferenceBands:
    return ReferenceBands(band, name, folder, scores=band.scoring == recipe_of_scores(config))

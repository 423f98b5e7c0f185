"""What a score depends on, told beside it."""

from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from src.metrics.fidelity import FidelityScore, Reference


@dataclass(frozen=True)
class Recipe:
    """How generated images were made, in words and numbers for the protocol.

    Attributes:
        training_steps: optimiser steps that the weights have seen.
        weights: "ema", "raw" or the length of a power-function average, "ema std=0.1".
        ema_decay: final decay of averaged weights that have one, else None.
        sampler, spacing, variance, guidance, clipping: the choices, in words.
        labels: which label each image has, in words.
        steps: sampler steps.
        network_evaluations: calls of the network per image, guidance included.
        seed: seed of the noise.
    """

    training_steps: int
    weights: str
    ema_decay: float | None
    sampler: str
    spacing: str
    variance: str
    guidance: str
    clipping: str
    labels: str
    steps: int
    network_evaluations: int
    seed: int


@dataclass(frozen=True)
class Protocol:
    """All that a score depends on; stored beside every score.

    Attributes:
        num_images: number of generated images.
        reference: the reference set, None for scores without one.
        features: name, size, sha256 and origin of the feature space.
        settings: the score's own numbers, e.g. subset sizes of KID.
        recipe: how the images were made.
        quantisation: how images became bytes.
        versions: of the libraries that computed it.
    """

    num_images: int
    reference: Reference | None
    features: dict[str, Any]
    settings: dict[str, Any]
    recipe: Recipe
    quantisation: str = "clip(round((x + 1) * 127.5), 0, 255) to uint8"
    versions: dict[str, str] = field(
        default_factory=lambda: {name: version(name) for name in ("torch", "torchmetrics", "torch-fidelity")}
    )

    @classmethod
    def of(cls, score: FidelityScore, recipe: Recipe) -> "Protocol":
        """The protocol of what `score.compute()` returned last."""
        space = score.features
        return cls(
            num_images=score.num_images,
            reference=score.reference,
            features={
                "name": space.name,
                "num_features": space.num_features,
                "sha256": space.sha256,
                "origin": space.origin,
            },
            settings=score.settings(),
            recipe=recipe,
        )

    def as_dict(self) -> dict[str, Any]:
        """Nested dicts of numbers and strings, ready for JSON."""
        return asdict(self)

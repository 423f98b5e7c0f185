"""What decides whether two scores may be compared.

Scores are comparable if they are computed in the same way (images, reference, features, settings, rounding) from images
that are made in the same way (weights, sampler, spacing, steps, guidance, clipping, labels, noise).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from src.evaluation.record import Record
from src.report.run import Run, flat
from src.report.texts import shortened

# Entries of a protocol that do not change a score's meaning, or follow from the others.
IMMATERIAL = re.compile(
    r"(versions|higher_is_better)(\..*)?|per_class(\..*)?|intervals?(\..*)?|reference\.(data|split)|features\.origin"
    r"|recipe\.(training_steps|network_evaluations|compiled)|images\.(from|number|files_left_out|sha256)"
)
# The score of a validation set depends on what the loss is.
LOSS_GROUPS = (
    *("data", "codec", "conditioning", "schedule", "parameterization", "loss", "weighting"),
    *("distance", "time_sampling", "variance"),
)
AS_IN_ROW = "as in the row"
# By name, for records of earlier versions.
HIGHER_IS_BETTER = re.compile(r"(precision|recall|density|coverage|accuracy|inception_score|auc)")


@dataclass(frozen=True)
class Column:
    """Scores that may be compared.

    Attributes:
        score: the score's name.
        protocol: everything that is equal in the column and matters, as (entry, value); of an entry that is an option
            of the comparison, only that it is known. `None` for a score without a protocol, which is comparable with
            no other.
        higher_is_better: see `higher_is_better`.
    """

    score: str
    protocol: tuple[tuple[str, str], ...] | None
    higher_is_better: bool | None = field(default=None, compare=False)


def higher_is_better(score: str, record: Record) -> bool | None:
    """Whether larger values of a score in a record are better; None if neither is, or it is not known."""
    if score.partition("/")[0].endswith("_std") or "memorisation" in record.protocol:
        return None
    stored = record.protocol.get("higher_is_better")
    if isinstance(stored, dict) and not score.startswith("val/"):
        found = stored.get(_family(score, stored))
        return found if isinstance(found, bool) else None
    return HIGHER_IS_BETTER.search(score) is not None


def interval_of(record: Record, score: str) -> tuple[float | None, float | None]:
    """The interval of a score in its record, if it has one."""
    return record.interval(score) or (None, None)


def column_of(record: Record, score: str, run: Run | None, asked: set[str]) -> Column:
    """The column in which a score belongs."""
    better = higher_is_better(score, record)
    if score.startswith("val/"):
        if run is None or not run.options:
            return Column(score, None, better)
        groups = {key: shortened(v) for key, v in run.options.items() if key.partition(".")[0] in LOSS_GROUPS}
        return Column(score, tuple(sorted(groups.items())), better)
    if not record.protocol:
        return Column(score, None, better)
    entries = {}
    for name, value in record.protocol.items():
        if name in ("reference", "features", "settings") and isinstance(value, dict):
            # of several scores in one record, each has an entry of its own
            value = value if _is_single(record) else value.get(_family(score, value), value)
        entries |= flat({name: value})
    per_class = record.protocol.get("per_class")
    base, _, label = score.partition("/class_")
    if label and isinstance(per_class, dict):
        of_base = per_class.get(base)
        of_label = of_base.get(label) if isinstance(of_base, dict) else None
        entries |= flat(of_label if isinstance(of_label, dict) else {}, "per_class_of_this")
    of_rows = {f"recipe.{key}" for key in asked}
    kept = {
        key: AS_IN_ROW if key in of_rows else shortened(value, None)
        for key, value in entries.items()
        if not IMMATERIAL.fullmatch(key)
    }
    return Column(score, tuple(sorted(kept.items())), better)


def _is_single(record: Record) -> bool:
    features = record.protocol.get("features")
    return not isinstance(features, dict) or not all(isinstance(v, dict) for v in features.values())


def _family(score: str, entries: Mapping[str, Any]) -> str:
    """Which of several scores a number belongs to: "kid" for "kid_std", "precision_digits" for "recall_digits"."""
    base = score.partition("/")[0]
    related = (
        base,
        base.removesuffix("_std"),
        base.replace("recall", "precision"),
        base.replace("coverage", "density"),
    )
    return next((name for name in related if name in entries), base)


def recipe_of(record: Record) -> dict[str, Any]:
    """How the images of a record were made; empty if it does not say."""
    recipe = record.protocol.get("recipe")
    return recipe if isinstance(recipe, dict) else {}


def evaluations_of(record: Record) -> int | None:
    """Network evaluations for an image; None if unknown."""
    found = recipe_of(record).get("network_evaluations")
    return found if isinstance(found, int) and found > 0 else None

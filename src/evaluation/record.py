"""Records of scores: the numbers and everything they depend on, stored as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

from annotated_types import Len
from pydantic import TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from src.errors import UserError
from src.runs.files import read_json, write_json

if TYPE_CHECKING:  # reading a record loads no torch
    from src.metrics.score import FidelityScore


@dataclass(frozen=True)
class Record:
    """Scores and their protocol, stored in <run>/scores.json, best.json and <run>/scores/<recipe>/scores.json.

    Attributes:
        scores: the scores by name, the monitored one first.
        protocol: everything the scores depend on; see `protocol_of`. Empty in files of earlier versions that hold only
            scores.
        curve: lists of numbers by name, e.g. the terms of a likelihood; or None.
        intervals: [low, high] of 95 % by name, of scores that have one; or None. See `src.metrics.uncertainty`.
        warnings: what is doubtful about the scores, one line each; or None.
    """

    scores: dict[str, float]
    protocol: dict[str, Any]
    curve: dict[str, list[float]] | None = None
    intervals: dict[str, list[float]] | None = None
    warnings: list[str] | None = None

    def write(self, path: Path) -> None:
        """Writes {"scores", "protocol"} and what else is not None as JSON, atomically; creates the folder.

        Raises:
            OSError: the file cannot be written.
        """
        write_json(path, {name: part for name, part in asdict(self).items() if part is not None})

    def interval(self, name: str) -> tuple[float, float] | None:
        """The 95 % interval of a score; None without one."""
        found = (self.intervals or {}).get(name)
        return None if found is None else (found[0], found[1])

    def printed(self, name: str) -> str:
        """A score with as many digits as its interval allows; see `printed`."""
        return printed(self.scores[name], self.interval(name))

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Reads a record, also from earlier versions, which wrote {"fid": 3.1} as <run>/scores.json.

        Raises:
            UserError: the file cannot be read, or its content is not a record.
        """
        try:
            content = read_json(path, dict[str, Any])
            if "scores" not in content:
                content = {"scores": content, "protocol": {}}
            TypeAdapter(Stored).validate_python(content, strict=True)
        except FileNotFoundError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{path} is not a record of scores: {where}: {first['msg'].lower()}") from None
        return cls(**content)


@with_config(extra="forbid")
class Stored(TypedDict):
    """A record as it is stored."""

    scores: dict[str, float]
    protocol: dict[str, Any]
    curve: NotRequired[dict[str, list[float]]]
    intervals: NotRequired[dict[str, Annotated[list[float], Len(2, 2)]]]
    warnings: NotRequired[list[str]]


def printed(value: float, interval: Sequence[float] | None) -> str:
    """A score with as many digits as its interval allows, e.g. "0.52 ± 0.03"; five digits without an interval.

    The half-width has one significant digit, two if the first is 1.
    """
    if interval is None:
        return f"{value:.5g}"
    half = (interval[1] - interval[0]) / 2
    if not 0 < half < math.inf:
        return f"{value:.5g}"
    first = math.floor(math.log10(half))
    digits = first - 1 if half < 2 * 10.0**first else first
    decimals = max(0, -digits)
    return f"{round(value, -digits):.{decimals}f} ± {round(half, -digits):.{decimals}f}"


def protocol_of(
    scores: "Sequence[FidelityScore]", recipe: Mapping[str, Any], quantisation: str
) -> dict[str, Any]:
    """Everything the last results of these scores depend on, as primitives for JSON.

    Entries:

    - num_images: number of generated images;
    - reference: data, split, count and fingerprint of the reference set; None for a score without one;
    - features: name, num_features, sha256 and origin of the feature space;
    - settings: settings of the score, e.g. the subset size of KID;
    - higher_is_better: by name of the score, whether larger values are better;
    - recipe: the given recipe;
    - quantisation: how images were converted to bytes;
    - versions: versions of the libraries that computed the scores.

    `ScoreSet.protocol` adds `intervals`, the method of the intervals, if there are any.

    With several scores, `reference`, `features` and `settings` hold one such entry per score, by name:
    {"features": {"fid": {"name": "inception", ...}, "kid": {...}}, ...}.

    Args:
        scores: at least one score, after `compute` on the same images.
        recipe: training_steps, weights, ema_decay, sampler, spacing, variance, guidance, clipping, labels, steps,
            network_evaluations, seed.
        quantisation: a description of how the images were converted to bytes.
    """
    single = len(scores) == 1

    def each(entry: dict[str, Any]) -> Any:
        return entry[scores[0].name] if single else entry

    return {
        "num_images": scores[0].num_images,
        "reference": each({s.name: s.reference and asdict(s.reference) for s in scores}),
        "features": each({s.name: s.features.describe() for s in scores}),
        "settings": each({s.name: s.settings() for s in scores}),
        "higher_is_better": {s.name: s.higher_is_better for s in scores},
        "recipe": dict(recipe),
        "quantisation": quantisation,
        "versions": {name: version(name) for name in ("torch", "torchmetrics", "torch-fidelity")},
    }

"""Records of scores: the numbers and everything they depend on, stored as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.metrics.score import FidelityScore
from src.runs.files import write_json


@dataclass(frozen=True)
class Record:
    """Scores and their protocol, stored in <run>/scores.json, best.json and <run>/scores/<recipe>/scores.json.

    Attributes:
        scores: the scores by name, the monitored one first.
        protocol: everything the scores depend on; see `protocol_of`. Empty in files of earlier versions that hold only
            scores.
        curve: lists of numbers by name, e.g. the terms of a likelihood; or None.
    """

    scores: dict[str, float]
    protocol: dict[str, Any]
    curve: dict[str, list[float]] | None = None

    def write(self, path: Path) -> None:
        """Writes {"scores", "protocol"} and "curve", if present, as JSON, atomically; creates the folder.

        Raises:
            OSError: the file cannot be written.
        """
        content = asdict(self)
        if self.curve is None:
            del content["curve"]
        write_json(path, content)

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Reads a record, also from earlier versions, which wrote {"fid": 3.1} as <run>/scores.json.

        Raises:
            UserError: the file cannot be read, or its content is not a record.
        """
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError):
            raise UserError(f"{path} is damaged: it is not JSON") from None
        if isinstance(content, dict) and "scores" not in content:
            content = {"scores": content, "protocol": {}}
        wrong = _fault(content)
        if wrong:
            raise UserError(f"{path} is not a record of scores: {wrong}")
        return cls(content["scores"], content["protocol"], content.get("curve"))


def _fault(content: Any) -> str | None:
    """Why parsed JSON is not a record; None if it is one."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}, not an object"
    if unknown := set(content) - {"scores", "protocol", "curve"}:
        return f"unknown entry {min(unknown)!r}"
    scores, protocol, curve = (content.get(name) for name in ("scores", "protocol", "curve"))
    if not isinstance(scores, dict):
        return "scores is not an object"
    for name, value in scores.items():
        if not _is_number(value):
            return f"scores.{name} is not a number"
    if not isinstance(protocol, dict):
        return "protocol is missing or not an object"
    if curve is not None:
        if not isinstance(curve, dict):
            return "curve is not an object"
        for name, values in curve.items():
            if not isinstance(values, list) or not all(map(_is_number, values)):
                return f"curve.{name} is not a list of numbers"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def protocol_of(
    scores: Sequence[FidelityScore], recipe: Mapping[str, Any], quantisation: str
) -> dict[str, Any]:
    """Everything the last results of these scores depend on, as primitives for JSON.

    Entries:

    - num_images: number of generated images;
    - reference: data, split, count and fingerprint of the reference set; None for a score without one;
    - features: name, num_features, sha256 and origin of the feature space;
    - settings: settings of the score, e.g. the subset size of KID;
    - recipe: the given recipe;
    - quantisation: how images were converted to bytes;
    - versions: versions of the libraries that computed the scores.

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
        "recipe": dict(recipe),
        "quantisation": quantisation,
        "versions": {name: version(name) for name in ("torch", "torchmetrics", "torch-fidelity")},
    }

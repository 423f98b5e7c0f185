"""Scores of many variants of one run's recipe on common noise: what `src.explain` and `src.search` share."""

import ast
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from src.app.build import class_of
from src.app.evaluate import IMAGES, prepared_scores, with_bytes
from src.app.load import load_with
from src.app.messages import check_names
from src.app.options import CONF, RUN_OPTIONS, check_options
from src.app.overrides import trusted_folders, with_guidance, written_out
from src.app.sweep.jobs import composed, option_of
from src.data.codec import Pixels, TruncatedPixels
from src.errors import UserError
from src.evaluation.bank import FeatureBank
from src.evaluation.record import Record, printed
from src.evaluation.scores import ScoreSet
from src.generation.loaded import LoadedRun
from src.metrics.uncertainty import Interval, Z

LOADED_BYTES = 1 << 30
"""Weights of loaded variants that are kept at once."""
PLACES = {*RUN_OPTIONS, "folder", "path", "file", "root", "cache"}
"""Arguments that name a run or a file. A record is untrusted and may not choose them."""


@dataclass(frozen=True)
class Scored:
    """The monitored score of a variant.

    Attributes:
        value: the score.
        interval: its 95 % interval.
        effects: the first-order effect of each image on it, if the score has them.
        n: number of images.
        seed: of the noise.
        evaluations: network evaluations per image.
        sampled: images that had to be sampled for it.
        record: its record.
    """

    value: float
    interval: Interval | None
    effects: Tensor | None
    n: int
    seed: int
    evaluations: int
    sampled: int
    record: Record

    def text(self) -> str:
        """The score with as many digits as its interval allows."""
        return printed(self.value, self.interval)

    def minus(self, other: "Scored") -> tuple[float, float]:
        """The difference to another variant and half of its 95 % interval.

        Images of equal number and seed come from the same noise; their effects are compared one by one.
        """
        difference = self.value - other.value
        if self.effects is None or other.effects is None:
            halves = [(i[1] - i[0]) / 2 if i else math.nan for i in (self.interval, other.interval)]
            return difference, math.hypot(*halves)
        a, b = self.effects - self.effects.mean(), other.effects - other.effects.mean()
        variance = a.var().item() / self.n + b.var().item() / other.n
        if self.seed == other.seed:
            common = min(self.n, other.n)
            product = (a[:common] * b[:common]).sum().item() / max(common - 1, 1)
            variance -= 2 * product * common / (self.n * other.n)
        return difference, Z * math.sqrt(max(variance, 0.0))


class Bench:
    """One run, whose variants are named by options of `src.evaluate`.

    Args:
        overrides: the options that all variants share, as of `src.evaluate`.

    Attributes:
        base: these options, written out.
        bank: the features of all images that were sampled.
        all_codecs: whether images are converted to bytes in each way, for features of all in one pass.
        higher_is_better: whether a higher score is better, known after the first.

    Raises:
        UserError: an option that does not exist.
    """

    def __init__(self, overrides: Sequence[str]):
        self.base = [part for argument in overrides for part in written_out(argument)]
        check_names("evaluate", self.base, [CONF, *trusted_folders(self.base)])
        config = self.config()
        if config.run is None:
            raise UserError("run is missing: give run=<run folder or checkpoint>")
        if config.images is not None or config.devices != 1 or config.per_class:
            raise UserError("images, devices and per_class are options of src.evaluate alone; leave them out")
        self.bank = FeatureBank(Path(config.cache).expanduser())
        self.all_codecs = False
        self.higher_is_better = False
        self._loaded: dict[str, tuple[LoadedRun, DictConfig, DictConfig]] = {}
        self._scores: dict[str, ScoreSet] = {}

    def options(self, extra: Iterable[str] = ()) -> list[str]:
        """The options of a variant: those of all, replaced where the variant has its own."""
        extra = list(extra)
        own = {option_of(override) for override in extra}
        kept = [
            override
            for override in self.base
            if option_of(override) not in own and option_of(override).partition(".")[0] not in own
        ]
        return with_guidance([*kept, *extra])

    def config(self, extra: Iterable[str] = ()) -> DictConfig:
        """The configuration of a variant, as of `src.evaluate`.

        Raises:
            UserError: an option is invalid.
        """
        config = composed("evaluate", self.options(extra))
        check_options("evaluate", config)
        return config

    def load(self, extra: Iterable[str] = ()) -> tuple[LoadedRun, DictConfig, DictConfig]:
        """The run with a variant's weights and recipe; the run's configuration with its choices; the variant's own.

        Raises:
            UserError: the variant is impossible.
        """
        key = " ".join(self.options(extra))
        if key not in self._loaded:
            config = self.config(extra)
            loaded, merged = load_with(config)
            size = sum(p.numel() * p.element_size() for p in loaded.denoiser.parameters())
            if (len(self._loaded) + 1) * size > LOADED_BYTES:
                self._loaded.clear()
            self._loaded[key] = (with_bytes(loaded, config.bytes), merged, config)
        return self._loaded[key]

    def scores(self, loaded: LoadedRun, merged: DictConfig, config: DictConfig) -> ScoreSet:
        """The monitored score with its reference; made once for each reference."""
        key = str(config.reference)
        if key not in self._scores:
            every = prepared_scores(loaded, merged, config)
            self._scores[key] = ScoreSet([every.monitored], intervals=True)
        return self._scores[key]

    def score(self, extra: Iterable[str] = (), n: int | None = None) -> Scored:
        """Scores a variant, sampling only images that are not known yet.

        Args:
            extra: its options.
            n: number of images; None for that of the options.

        Raises:
            UserError: the variant is impossible, or there are too few images.
        """
        loaded, merged, config = self.load(extra)
        n = n or config.n or IMAGES
        scores = self.scores(loaded, merged, config)
        codec = loaded.recipe.codec
        others = ()
        if self.all_codecs and isinstance(codec, Pixels):
            others = (Pixels(codec.image_shape), TruncatedPixels(codec.image_shape))
        found = self.bank.get(loaded, scores, n, config.batch_size, others)
        scores.reset()
        features, labels = found.of(codec, n)
        scores.update_features({name: each.to(loaded.device) for name, each in features.items()}, labels)
        values = scores.compute(n)
        record = scores.record(values, loaded.record(found.evaluations), codec.describe())
        name = scores.monitored.name
        self.higher_is_better = scores.monitored.higher_is_better
        effects = scores.influences()
        return Scored(
            values[name],
            record.interval(name),
            None if effects is None else effects.double().cpu(),
            n,
            config.seed,
            found.evaluations,
            found.sampled,
            record,
        )


def overrides_of(group: str, description: str) -> list[str] | None:
    """The options that make the part of a record, e.g. "DDIM(eta=0.5)"; None where they are not known or not allowed.

    A record is untrusted: see `parsed_part` for what it may set.

    Args:
        group: the group of the configuration, e.g. "sampler".
        description: as by `src.generation.recipe.describe`.
    """
    if description == "none":
        return [f"{group}=none"]
    found = parsed_part(description)
    if found is None:
        return None
    name, arguments = found
    best: list[str] | None = None
    for path in sorted((CONF / group).glob("*.yaml")):
        node = OmegaConf.to_container(OmegaConf.load(path))
        if str(node.get("_target_", "")).rpartition(".")[2] != name or PLACES & node.keys():
            continue
        differing = {key: value for key, value in arguments.items() if node.get(key, ...) != value}
        options = [
            f"{'' if key in node else '+'}{group}.{key}={in_hydra(value)}" for key, value in differing.items()
        ]
        if best is None or len(options) + 1 < len(best):
            best = [f"{group}={path.stem}", *options]
    return best


def parsed_part(description: str) -> tuple[str, dict[str, Any]] | None:
    """Class and arguments of a described part; None if it is not of this form, or not allowed.

    Allowed are the values of `in_hydra`, for arguments that name no run and no file (`PLACES`).
    """
    try:
        call = ast.parse(description, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            return None
        arguments = {str(word.arg): _literal(word.value) for word in call.keywords}
        arguments = {name: value for name, value in arguments.items() if not name.startswith("_")}
        for value in arguments.values():
            in_hydra(value)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # as of `ast.literal_eval`
        return None
    return None if PLACES & arguments.keys() else (call.func.id, arguments)


def _literal(node: ast.expr) -> Any:
    """A Python literal, or an infinite number, which `repr` writes as a name."""
    if isinstance(node, ast.Name) and node.id == "inf":
        return math.inf
    return ast.literal_eval(node)


def in_hydra(value: Any) -> str:
    """A value as Hydra reads it on the command line.

    Raises:
        ValueError: it is no number, bool, None, word of letters, digits and "_.+-", or list of these. Other texts could
            be interpolations, e.g. of an environment variable.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(in_hydra, value))}]"
    if isinstance(value, int | float) or (isinstance(value, str) and re.fullmatch(r"[\w.+-]+", value)):
        return str(value)
    raise ValueError(f"{value!r} is no number and no word")


def guided(merged: DictConfig) -> bool:
    """Whether a run with its choices has guidance."""
    return class_of(merged.guidance) is not None


def own_options(arguments: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Those of the arguments that set one of these options, by name, and the others.

    Raises:
        UserError: a flag, which these commands do not have.
    """
    own, others = {}, []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if argument.startswith("-"):
            raise UserError(f"{argument}: this command has no such flag")
        if name in names:
            own[name] = value
        else:
            others.append(argument)
    return own, others

"""The job of `src.explain`: which choice of the evaluation accounts for how much of the gap between two scores."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig
from pydantic import BeforeValidator, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from src.app.bench import Bench, Scored, guided, in_hydra, overrides_of, own_options, parsed_part
from src.app.build import class_of, trusting
from src.app.environment import redacted
from src.app.evaluate import AS_GIVEN, IMAGES
from src.app.options import NUMERICS
from src.app.overrides import trusted_packages
from src.app.parts import metric_nodes
from src.data.source import SPLITS, ImageSource
from src.errors import UserError
from src.evaluation.record import Record, printed
from src.generation.loaded import USUAL, LoadedRun
from src.runs.files import digest_of, write_json
from src.training import post_hoc

OWN = ("record", "axes")
AXES = ("weights", "steps", "sampler", "spacing", "clipping", "variance", "guidance", "interval", "labels")
AXES += ("precision", "bytes", "reference", "n", "seed")
"""The axes that a record may have."""
AS_USUAL = {"precision": USUAL.precision, "compiled": USUAL.compiled, "noise": f"drawn on {USUAL.noise}"}
"""What this program's recipes leave out where it is as usual; see `Numerics.record`."""


def _by_score(entry: Any) -> Any:
    """An entry of several scores, e.g. `reference`; that of one score gets the name ""."""
    if not isinstance(entry, dict) or any(isinstance(each, dict) for each in entry.values()):
        return entry
    return {"": entry}


class TheirReference(TypedDict, total=False):
    """What is read of a reference."""

    data: str
    split: str
    count: int
    fingerprint: str


class TheirFeatures(TypedDict, total=False):
    """What is read of a feature space."""

    name: str
    sha256: str


@with_config(extra="allow")
class TheirRecipe(TypedDict, total=False):
    """The recipe of a record; an entry that is missing is not known. Further entries are conditions."""

    weights: str
    ema_decay: float | None
    steps: int
    sampler: str
    spacing: str
    clipping: str
    variance: str
    guidance: str
    labels: str
    precision: str
    seed: int
    network_evaluations: Any  # follows from the others


class TheirProtocol(TypedDict, total=False):
    """What is read of the protocol of a record, which may be written by hand; see `protocol_of`."""

    num_images: int
    reference: Annotated[dict[str, TheirReference | None] | None, BeforeValidator(_by_score)]
    features: Annotated[dict[str, TheirFeatures | None] | None, BeforeValidator(_by_score)]
    settings: dict[str, Any] | None
    recipe: TheirRecipe | None
    quantisation: str


@dataclass(frozen=True)
class Axis:
    """One choice that is changed.

    Attributes:
        name: e.g. "steps".
        before, after: the choice as it is and as it is tried.
        options: what makes it, as options of src.evaluate; None where this program cannot make it.
    """

    name: str
    before: str
    after: str
    options: tuple[str, ...] | None


def explain_scores(arguments: Sequence[str]) -> int:
    """Prints how the score of a run changes along each axis, and the share of the gap to another record.

    Args:
        arguments: the command line without the program's name.

    Returns:
        0.

    Raises:
        UserError: a mistake in the arguments, or a record without the score, or with one that is not finite or an
            entry of a wrong type.
    """
    own, overrides = own_options(arguments, OWN)
    with trusting(trusted_packages(overrides)):
        bench = Bench(overrides)
        given = own.get("record") not in (None, "null")
        other = Record.read(Path(own["record"])) if given else None
        theirs = protocol_from(other, own["record"]) if other else {}
        loaded, merged, config = bench.load()
        usual = other is None
        axes = usual_axes(loaded, merged, config) if usual else axes_of_record(loaded, config, theirs)
        names = list(dict.fromkeys(axis.name for axis in axes)) if usual else AXES
        wanted = set(names)
        if own.get("axes") not in (None, "null"):
            wanted = {name.strip() for name in own["axes"].strip("[]").split(",")}
        if unknown := wanted.difference(names):
            who = "this run has" if usual else "there is"
            raise UserError(
                f"axes={own['axes']}: {who} no {', '.join(sorted(unknown))}; choose from {', '.join(names)}"
            )
        if other is not None:
            check_score(other, own["record"], bench.scores(loaded, merged, config).monitored.name)
        axes = [axis for axis in axes if axis.name in wanted]
        bench.all_codecs = any(axis.name == "bytes" for axis in axes)
        _run(bench, loaded, axes, wanted, other, theirs)
    return 0


def protocol_from(record: Record, path: str) -> TheirProtocol:
    """The entries of a record's protocol that are used here, with those that this program leaves out as usual.

    Args:
        record: the record.
        path: its file, for errors.

    Raises:
        UserError: an entry has a wrong type.
    """
    try:
        found = TypeAdapter(TheirProtocol).validate_python(record.protocol, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("protocol", *first["loc"]) if part != "")
        raise UserError(
            f"record={path}: {where}: {first['msg'].lower()}, got {str(first['input'])[:60]!r}; correct it or leave"
            " it out"
        ) from None
    if "versions" in record.protocol and (recipe := found.get("recipe")):  # only this program writes versions
        found["recipe"] = {**AS_USUAL, **recipe}
    return found


def check_score(record: Record, path: str, name: str) -> None:
    """Checks that a record from this file has a score of this name.

    Raises:
        UserError: it has none, or one that is not finite.
    """
    if name not in record.scores:
        has = ", ".join(record.scores) or "no scores"
        raise UserError(f"record={path}: it has {has} and not {name}; choose that by metrics=...")
    if not math.isfinite(value := record.scores[name]):
        raise UserError(f"record={path}: {name} is {value}; give a record with a finite score")
    if not all(map(math.isfinite, record.interval(name) or ())):
        raise UserError(f"record={path}: the interval of {name} is not finite; correct it or leave it out")


def _run(
    bench: Bench,
    loaded: LoadedRun,
    axes: list[Axis],
    wanted: set[str],
    other: Record | None,
    theirs: TheirProtocol,
) -> None:
    base = bench.score()
    name = next(iter(base.record.scores))
    print(f"run         {loaded.found.checkpoint}\nscore       {name} {base.text()} of {base.n:,} images")
    gap, gap_half = None, 0.0
    if other is not None:
        gap = other.scores[name] - base.value
        if interval := other.interval(name):
            gap_half = (interval[1] - interval[0]) / 2
        print(f"record      {name} {other.printed(name)}, a gap of {gap:+.4g}")
        if abs(gap) <= gap_half:
            print("warning     the gap is within the record's interval: its shares say little")
    others = other_conditions(base.record.protocol, theirs, name, loaded.source)
    axes = [*axes, *(axis for axis in others if axis.options is None or axis.name in wanted)]
    rows: list[dict[str, Any]] = []
    for axis in axes:
        if axis.options is None:
            rows.append(_row(axis, error="differs, and cannot be made here"))
            continue
        print(f"scoring     {axis.name}: {axis.after}", flush=True)
        try:
            rows.append(_row(axis, bench.score(axis.options), base, gap, gap_half))
        except UserError as error:
            rows.append(_row(axis, error=redacted(str(error))))
    possible = [axis for axis in axes if axis.options is not None]
    if other is not None and len(possible) > 1:
        together = Axis("all of them", "", "", tuple(o for axis in possible for o in joint(axis, possible)))
        try:
            rows.append(_row(together, bench.score(together.options), base, gap, gap_half))
        except UserError as error:
            rows.append(_row(together, error=redacted(str(error))))
    _print(rows, name, gap)
    content = {
        "score": name,
        "base": {"value": base.value, "interval": base.interval, "protocol": base.record.protocol},
        "record": None if other is None else other.scores[name],
        "gap": gap,
        "axes": rows,
        "images_sampled": bench.bank.sampled,
        "network_evaluations": bench.bank.spent,
    }
    path = loaded.found.folder / "scores" / f"explain_{digest_of(content)}" / "explain.json"
    write_json(path, content)
    print(
        f"sampled     {bench.bank.sampled:,} images, {bench.bank.spent:,} network evaluations\nwritten     {path}"
    )


def joint(axis: Axis, axes: Sequence[Axis]) -> list[str]:
    """The options of an axis beside those of others: the axes sampler and guidance leave out what others set."""
    others = {option.partition("=")[0] for a in axes if a is not axis for option in a.options or ()}
    return [
        option
        for option in axis.options or ()
        if not (
            (axis.name == "sampler" and option.startswith("sampler.steps=") and "sampler.steps" in others)
            or (axis.name == "guidance" and "guidance.interval=" in option and _of(axes, "interval"))
        )
    ]


def _of(axes: Sequence[Axis], name: str) -> bool:
    return any(axis.name == name for axis in axes)


def _row(
    axis: Axis,
    scored: Scored | None = None,
    base: Scored | None = None,
    gap: float | None = None,
    gap_half: float = 0.0,
    error: str | None = None,
) -> dict[str, Any]:
    row: dict[str, Any] = {"axis": axis.name, "before": axis.before, "after": axis.after}
    if scored is None or base is None:
        return row | {"error": error}
    change, half = scored.minus(base)
    row |= {
        "options": list(axis.options or ()),
        "value": scored.value,
        "interval": scored.interval,
        "change": change,
        "half_interval": half if math.isfinite(half) else None,
        "sampled": scored.sampled,
        "evaluations": scored.evaluations,
    }
    if gap:
        row["share"] = change / gap
        row["share_half_interval"] = math.hypot(half, row["share"] * gap_half) / abs(gap)
    return row


def _print(rows: Sequence[dict[str, Any]], name: str, gap: float | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("axis", "from", "to", name, "change", *(["share of gap"] if gap else []), "sampled")
    with_change = [row for row in rows if "change" in row and row["axis"] != "all of them"]
    ordered = sorted(with_change, key=lambda row: -abs(row["change"]))
    for row in [*ordered, *(row for row in rows if row not in ordered)]:
        cells = [escape(row[cell]) for cell in ("axis", "before", "after")]
        if "change" not in row:
            table.add_row(*cells, f"[red]{escape(row['error'])}")
            continue
        half = row["half_interval"]
        change = printed(row["change"], None if half is None else (-half, half))
        cells += [printed(row["value"], row["interval"]), f"{'+' if row['change'] >= 0 else ''}{change}"]
        if gap:
            cells.append(f"{100 * row['share']:.0f} % ± {100 * row['share_half_interval']:.0f} %")
        table.add_row(*cells, f"{row['sampled']:,}")
    Console(width=None if Console().is_terminal else 180).print(table)


def usual_axes(loaded: LoadedRun, merged: DictConfig, config: DictConfig) -> list[Axis]:
    """The axes of a run with the usual alternative on each."""
    recipe, record = loaded.recipe, loaded.record(0)
    n = config.n or IMAGES
    axes = _weights_axes(loaded, config)
    if guided(merged):
        axes.append(Axis("guidance", record["guidance"], "none", ("guidance=none",)))
        # there are no options for a run's own guidance by another run
        made = overrides_of("guidance", record["guidance"]) if config.get("guidance") is None else []
        if made is not None and "interval" in merged.guidance:
            interval = merged.guidance.interval and list(merged.guidance.interval)
            other = None if interval else [0.2, 5.0]
            axes.append(Axis("interval", in_hydra(interval), in_hydra(other), _with_interval(made, other)))
    elif recipe.conditioning is not None and recipe.conditioning.dropout:
        axes.append(Axis("guidance", "none", "scale 1.5", ("guidance=classifier_free", "guidance.scale=1.5")))
    steps = recipe.steps
    axes.append(Axis("steps", str(steps), str(2 * steps), (f"sampler.steps={2 * steps}",)))
    another = "ddim" if record["sampler"].startswith("DDPM") else "ddpm"
    axes.append(Axis("sampler", record["sampler"], another, (f"sampler={another}", f"sampler.steps={steps}")))
    spacing = "leading" if record["spacing"].startswith("Trailing") else "trailing"
    axes.append(Axis("spacing", record["spacing"], spacing, (f"spacing={spacing}",)))
    clipping = "none" if recipe.clips else "static"
    axes.append(Axis("clipping", record["clipping"], clipping, (f"clipping={clipping}",)))
    if recipe.conditioning is not None and "labels" in recipe.conditioning.kinds:
        labels = "balanced" if "drawn" in record["labels"] else "random"
        axes.append(Axis("labels", record["labels"], labels, (f"labels={labels}",)))
    how = "round" if config.bytes == "truncate" else "truncate"
    axes.append(Axis("bytes", config.bytes, how, (f"bytes={how}",)))
    metric = next(iter(metric_nodes(merged).values()), {})
    if metric and getattr(class_of(metric), "needs_reference", True):
        own = metric.get("reference_split", "train")
        given = (config.reference or own).replace(":", "/").rpartition("/")[2]
        split = "train" if (given if given in SPLITS else own) == "test" else "test"
        axes.append(Axis("reference", config.reference or own, split, (f"reference={split}",)))
    axes.append(Axis("n", str(n), str(n // 2), (f"n={n // 2}",)))
    axes.append(Axis("seed", str(config.seed), str(config.seed + 1), (f"seed={config.seed + 1}",)))
    return axes


def _weights_axes(loaded: LoadedRun, config: DictConfig) -> list[Axis]:
    """Raw weights for averaged ones and the reverse, and another length of the average where there are snapshots."""
    other = "ema" if config.weights == "raw" else "raw"
    axes = [Axis("weights", loaded.weights, other, (f"weights={other}",))]
    if post_hoc.snapshots(loaded.found.folder / post_hoc.FOLDER):
        length = "0.05" if _length(loaded.weights) == 0.1 else "0.1"
        axes.append(Axis("weights", loaded.weights, f"ema std={length}", (f"weights={length}",)))
    return axes


def _length(weights: str | None) -> float | None:
    """The length of an average, e.g. of "ema std=0.05"; None for other weights."""
    found = re.match(r"ema std=(\d+(?:\.\d+)?(?:e-?\d+)?)", weights or "")
    return found and float(found[1])


def axes_of_record(loaded: LoadedRun, config: DictConfig, protocol: TheirProtocol) -> list[Axis]:
    """The axes along which a run's evaluation differs from the protocol of another record."""
    mine = AS_USUAL | loaded.record(0)
    theirs: TheirRecipe = protocol.get("recipe") or {}
    axes: list[Axis] = []

    def differ(key: str) -> bool:
        return key in theirs and theirs[key] != mine[key]

    if differ("weights") or differ("ema_decay"):
        axes.append(_weights_axis(loaded, mine, theirs))
    if differ("steps"):
        steps = theirs["steps"]
        axes.append(Axis("steps", str(mine["steps"]), str(steps), (f"sampler.steps={steps}",)))
    if differ("sampler"):
        made = overrides_of("sampler", theirs["sampler"])
        options = None if made is None else (*made, f"sampler.steps={mine['steps']}")
        axes.append(Axis("sampler", mine["sampler"], theirs["sampler"], options))
    for name in ("spacing", "clipping", "variance"):
        if differ(name):
            made = overrides_of(name, theirs[name])
            axes.append(Axis(name, mine[name], theirs[name], made and tuple(made)))
    if differ("guidance"):
        axes += _guidance_axes(mine["guidance"], theirs["guidance"])
    if differ("labels"):
        axes.append(Axis("labels", mine["labels"], theirs["labels"], _labels(theirs["labels"])))
    if differ("precision"):
        precision = theirs["precision"]
        options = (f"precision={precision}",) if precision in NUMERICS[0].choices else None
        axes.append(Axis("precision", mine["precision"], precision, options))
    quantisation = protocol.get("quantisation", AS_GIVEN)
    if quantisation not in (AS_GIVEN, loaded.recipe.codec.describe()):
        how = "truncate" if "truncated" in quantisation else "round"
        made = None if how == config.bytes else (f"bytes={how}",)
        axes.append(Axis("bytes", config.bytes, how if made else quantisation, made))
    n = config.n or IMAGES
    other = protocol.get("num_images") or n
    if other != n:
        axes.append(Axis("n", str(n), str(other), (f"n={other}",)))
    if differ("seed"):
        axes.append(Axis("seed", str(mine["seed"]), str(theirs["seed"]), (f"seed={theirs['seed']}",)))
    return axes


def _weights_axis(loaded: LoadedRun, mine: dict[str, Any], theirs: TheirRecipe) -> Axis:
    def words(weights: str, decay: float | None) -> str:
        return weights + (f" decay {decay:g}" if decay else "")

    options: tuple[str, ...] | None = None
    name = theirs.get("weights")
    length = _length(name)
    if name == "raw":
        options = ("weights=raw",)
    elif length and post_hoc.snapshots(loaded.found.folder / post_hoc.FOLDER):
        options = (f"weights={length}",)
    elif name == "ema" and mine["weights"] == "raw":
        options = ("weights=ema",)
    before = words(mine["weights"], mine["ema_decay"])
    return Axis("weights", before, words(name or "not known", theirs.get("ema_decay")), options)


def _guidance_axes(mine: str, theirs: str) -> list[Axis]:
    """Strength and interval of guidance separately, if both have guidance of one kind."""
    made = overrides_of("guidance", theirs)
    a, b = parsed_part(mine), parsed_part(theirs)
    if a is None or b is None or a[0] != b[0]:
        return [Axis("guidance", mine, theirs, made and tuple(made))]
    own, other = a[1].get("interval"), b[1].get("interval")
    same = overrides_of("guidance", mine)
    axes = []
    if {**a[1], "interval": None} != {**b[1], "interval": None}:
        axes.append(Axis("guidance", mine, theirs, made and _with_interval(made, own)))
    if own != other:
        axes.append(Axis("interval", in_hydra(own), in_hydra(other), same and _with_interval(same, other)))
    return axes


def _with_interval(options: Iterable[str], interval: Any) -> tuple[str, ...]:
    """Options of guidance, with another interval."""
    kept = [option for option in options if not option.startswith("guidance.interval=")]
    return (*kept, f"guidance.interval={in_hydra(interval)}")


def _labels(description: str) -> tuple[str, ...] | None:
    if "label drawn" in description:
        return ("labels=random",)
    if "label i mod " in description:
        return ("labels=balanced",)
    # numbers only: the record is untrusted
    entries = re.search(r"of (\[[0-9]+(?:, ?[0-9]+)*\])$", description)
    return (f"labels={entries[1].replace(' ', '')}",) if entries else None


def other_conditions(
    mine: Mapping[str, Any], theirs: TheirProtocol, score: str, source: ImageSource
) -> list[Axis]:
    """What a record has besides the axes of its recipe: reference, features, settings of the score, further entries.

    No option makes them, except another split of the run's data as the reference.

    Args:
        mine: the protocol of the run's score.
        theirs: that of the record; an entry that is missing is not known.
        score: the name of the score.
        source: the run's data.
    """

    def both(part: str) -> list[Mapping[str, Any]]:
        entries = [_by_score(protocol.get(part)) or {} for protocol in (mine, theirs)]
        return [entry.get(score, entry.get("")) or {} for entry in entries]

    axes = _reference_axes(*both("reference"), source)
    axes += _conditions("features", *both("features"), ("name", "sha256"))
    ours, other = both("settings")
    axes += _conditions("settings", ours, other, sorted(other))
    recipe = theirs.get("recipe") or {}
    further = sorted(recipe.keys() - TheirRecipe.__annotations__.keys())
    return axes + _conditions("recipe", AS_USUAL | mine["recipe"], recipe, further)


def _conditions(
    part: str, mine: Mapping[str, Any], theirs: Mapping[str, Any], keys: Iterable[str]
) -> list[Axis]:
    """The entries of a part of the protocol that differ, of those with these keys."""
    axes = []
    for key in keys:
        here = list(mine[key]) if isinstance(mine.get(key), tuple) else mine.get(key)
        if key in theirs and theirs[key] != here:
            axes.append(Axis(f"{part}.{key}", str(here), str(theirs[key]), None))
    return axes


def _reference_axes(mine: Mapping[str, Any], theirs: Mapping[str, Any], source: ImageSource) -> list[Axis]:
    """Another split of the run's data as the reference, or what differs of a reference that cannot be made."""
    if not mine or theirs.get("fingerprint") == mine["fingerprint"]:
        return []
    name, split = (theirs.get(key, mine[key]) for key in ("data", "split"))
    if name == source.name and split in SPLITS and (name, split) != (mine["data"], mine["split"]):
        before = mine["split"] if mine["data"] == source.name else mine["data"]
        own = {"fingerprint": source.fingerprint(split)}
        other_images = _conditions("reference", own, theirs, own)
        return other_images or [Axis("reference", before, split, (f"reference={split}",))]
    # another split has other images
    keys = ("data", "count", "fingerprint") if split == mine["split"] else ("data", "split")
    return _conditions("reference", mine, theirs, keys)

"""Runs and records side by side: which options differ, and which scores may stand in one column.

Two scores share a column if they are computed in the same way (images, reference, features, settings, rounding) from
images that are made in the same way (weights, sampler, spacing, steps, guidance, clipping, labels, noise). What a sweep
varies on purpose, or all of the latter where only one checkpoint is compared, are options: a difference between rows.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.evaluation.record import Record
from src.report.run import Run, find_runs, flat, inside, is_run, jobs_of, read_run
from src.runs.files import Damaged, read_json
from src.runs.folder import SCORES_FILE

# Entries of a protocol that do not change a score's meaning, or follow from the others.
IMMATERIAL = re.compile(
    r"versions(\..*)?|per_class(\..*)?|intervals?(\..*)?|reference\.(data|split)|features\.origin"
    r"|recipe\.(training_steps|network_evaluations)"
)
# Which entries of a recipe an option of a sweep decides.
DECIDES = {
    "sampler": ("sampler", "steps"),
    "sampler.steps": ("steps",),
    "spacing": ("spacing",),
    "guidance": ("guidance",),
    "wrappers": ("guidance",),
    "clipping": ("clipping",),
    "variance": ("variance",),
    "labels": ("labels",),
    "prompts": ("labels",),
    "conditioning": ("labels",),
    "weights": ("weights", "ema_decay"),
    "ema": ("weights", "ema_decay"),
    "seed": ("seed",),
    "generation.seed": ("seed",),
    "preset": ("sampler", "steps", "spacing", "clipping", "variance"),
}
# Options of which results do not depend, or that only say where things are.
INCIDENTAL = re.compile(
    r"(ckpt|runs|name|cache|sweep|rerun_failed|launcher|logger|allow_changes|trust|workers|callbacks\.progress"
    r"|labels|prompts|hydra)(\..*)?"
)
# The score of a validation set depends on what the loss is.
LOSS_GROUPS = (
    *("data", "codec", "conditioning", "schedule", "parameterization", "loss", "weighting"),
    *("distance", "time_sampling", "variance"),
)
HIGHER_IS_BETTER = re.compile(r"(precision|recall|density|coverage|accuracy|inception_score|auc)")
OWN_NAMES = {"seed": "sampling seed"}  # of a recipe; the option `seed` of a training is another one
SEEDS = ("seed", "generation.seed", "sampling seed")
ABSENT = "–"
LONGEST = 60
UNCLEAR = ("true", "false", "none", "null", "auto", "default")


@dataclass(frozen=True)
class Scored:
    """A record, and where it was found.

    Attributes:
        record: the scores and their protocol.
        path: its file.
        options: of a job of a sweep that made it, the options that differ between the jobs.
    """

    record: Record
    path: Path
    options: tuple[str, ...] = ()


@dataclass
class Subject:
    """What is compared: a run with its records, or records without a run.

    Attributes:
        name: short, and different from that of the other subjects.
        run: None for a record of images from elsewhere.
        records: its records.
        options: those that differ between the subjects, by name; filled by `Comparison`.
    """

    name: str
    run: Run | None
    records: list[Scored]
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """Scores that may be compared.

    Attributes:
        score: the score's name.
        protocol: everything that is equal in the column and matters, as (entry, value); `None` for a score without a
            protocol, which is comparable with no other.
    """

    score: str
    protocol: tuple[tuple[str, str], ...] | None

    @property
    def higher_is_better(self) -> bool:
        """Whether larger values are better."""
        return higher_is_better(self.score)


@dataclass(frozen=True)
class Cell:
    """One score in the table, with its record, and its interval where the record has one."""

    value: float
    scored: Scored
    low: float | None = None
    high: float | None = None

    @property
    def half(self) -> float | None:
        """Half of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass
class Row:
    """One checkpoint, sampled in one way.

    Attributes:
        subject: the run.
        step: training steps of the checkpoint; None if unknown.
        options: what differs from the other rows, by name.
        cells: the scores by column.
        records: where they come from; more than one where several commands scored the same images.
        evaluations: network evaluations for an image; None if unknown.
    """

    subject: Subject
    step: int | None
    options: dict[str, str]
    cells: dict[Column, Cell] = field(default_factory=dict)
    records: list[Scored] = field(default_factory=list)
    evaluations: int | None = None

    @property
    def seed(self) -> str:
        """What identifies the repetition."""
        return ",".join(self.options[name] for name in SEEDS if name in self.options)

    @property
    def setting(self) -> dict[str, str]:
        """The options without the seed."""
        return {name: value for name, value in self.options.items() if name not in SEEDS}


def higher_is_better(score: str) -> bool:
    """Whether larger values of a score are better, by its name."""
    return HIGHER_IS_BETTER.search(score) is not None and not score.endswith("_std")


def subjects_of(places: Iterable[Path], advance: Any = None) -> list[Subject]:
    """The runs and records at these places, each once.

    Args:
        places: run folders, sweeps, folders with runs, or record files.
        advance: called after each run.

    Raises:
        UserError: there is nothing, or a place is no such thing.
    """
    found: dict[Path, Subject] = {}
    for place in places:
        added = list(_at(place, advance))
        if not added:
            raise UserError(f"{place}: no run, no sweep and no record of scores there")
        for subject in added:
            key = subject.run.folder if subject.run else subject.records[0].path
            known = found.setdefault(key.resolve(), subject)
            if known is not subject:  # another sweep over the same run
                paths = {scored.path: scored for scored in (*known.records, *subject.records)}
                known.records = list(paths.values())
    subjects = list(found.values())
    _name_apart(subjects)
    return subjects


def _at(place: Path, advance: Any) -> Iterator[Subject]:
    if not place.exists():
        raise UserError(f"{place}: no such file or folder")
    if place.is_file():
        yield Subject(place.stem, None, [Scored(Record.read(place), place)])
        return
    jobs = jobs_of(place)
    if jobs is not None and jobs["entry_point"] == "evaluate":
        yield from _evaluated(place, jobs["jobs"])
        return
    empty = True
    for folder, varied in find_runs(place):
        empty = False
        run = read_run(folder, varied)
        if advance:
            advance()
        records = [] if run.record is None else [Scored(run.record, folder / SCORES_FILE, varied)]
        yield Subject(folder.name, run, records + _further_records(run))
    if empty:
        for path in sorted(place.glob(f"**/{SCORES_FILE}")):
            yield Subject(path.parent.name, None, [Scored(Record.read(path), path)])


def _further_records(run: Run) -> list[Scored]:
    """The records of `src.evaluate` in a run folder."""
    found = []
    for path in sorted((run.folder / "scores").glob(f"*/{SCORES_FILE}")):
        try:
            found.append(Scored(Record.read(path), path))
        except UserError as error:
            run.problems.append(str(error))
    return found


def _evaluated(sweep: Path, jobs: Sequence[Mapping[str, Any]]) -> Iterator[Subject]:
    """The runs that a sweep of `src.evaluate` has scored, each with the records that the sweep made."""
    subjects: dict[Path, Subject] = {}
    further: dict[Path, list[Scored]] = {}
    for job in jobs:
        place = next((o.partition("=")[2] for o in job["overrides"] if o.startswith("run=")), "")
        path = Path(place.strip("'\"")).expanduser()
        folder = path.parent.parent if path.suffix == ".ckpt" else path
        if not place or not is_run(folder):
            continue
        if folder not in subjects:
            subjects[folder] = Subject(folder.name, read_run(folder), [])
            further[folder] = _further_records(subjects[folder].run)
        try:
            outcome = read_json(inside(sweep, job["folder"]) / "outcome.json", dict[str, Any])
        except (FileNotFoundError, Damaged):
            continue
        scores = outcome.get("scores")
        # the job's folder has no protocol; the record in the run folder has the very same numbers
        made = next((each for each in further[folder] if _same(each.record.scores, scores)), None)
        if made is not None:
            subjects[folder].records.append(Scored(made.record, made.path, tuple(job["varied"])))
    yield from subjects.values()


def _same(scores: Mapping[str, float], found: Any) -> bool:
    """Whether an outcome has the scores of a record; it may have further numbers, and NaN equals NaN."""
    return isinstance(found, dict) and all(
        repr(found.get(name)) == repr(value) for name, value in scores.items()
    )


def _name_apart(subjects: list[Subject]) -> None:
    for subject in subjects:
        run = subject.run
        if run and run.varied:
            number = run.folder.name.partition("_")[0]
            subject.name = f"{number}: {in_words(dict(_split(option) for option in run.varied))}"
        elif run and isinstance(run.options.get("name"), str):
            subject.name = run.options["name"]
    for _ in range(2):
        counts = Counter(subject.name for subject in subjects)
        for subject in subjects:
            if counts[subject.name] > 1:
                place = subject.run.folder if subject.run else subject.records[0].path.parent
                subject.name = f"{place.parent.name}/{place.name}"


class Comparison:
    """The table of a report.

    Args:
        subjects: what is compared.

    Attributes:
        subjects: the same, with their options.
        rows: checkpoints, each sampled in one way.
        columns: comparable scores, the most frequent first; validation losses last.
        options: the options that differ between rows, by name: their values in order.
    """

    def __init__(self, subjects: Sequence[Subject]):
        self.subjects = list(subjects)
        for subject, options in zip(self.subjects, differing_options(self.subjects), strict=True):
            subject.options = options
        asked = self._asked()
        recipes = [_recipe(scored.record) for subject in self.subjects for scored in subject.records]
        values = {key: {shortened(recipe[key], None) for recipe in recipes if key in recipe} for key in asked}
        differ = {key: concise(several) for key, several in values.items() if len(several) > 1}
        self.rows: list[Row] = []
        for subject in self.subjects:
            self._add(subject, differ, asked)
        order = Counter(column for row in self.rows for column in row.cells)
        self.columns = sorted(order, key=lambda column: (column.score.startswith("val/"), -order[column]))
        names = dict.fromkeys(name for row in self.rows for name in row.options)
        self.options = {
            name: sorted({row.options.get(name, ABSENT) for row in self.rows}, key=natural) for name in names
        }

    def _asked(self) -> set[str]:
        """The entries of the recipe that are options of this comparison: varied by a sweep, or for one checkpoint."""
        found: set[str] = set()
        for subject in self.subjects:
            values: dict[tuple[Any, str], set[str]] = {}
            for scored in subject.records:
                recipe = _recipe(scored.record)
                for key in recipe.keys() - {"training_steps", "network_evaluations"}:
                    values.setdefault((recipe.get("training_steps"), key), set()).add(repr(recipe[key]))
                for option in map(name_of, scored.options):
                    root = option.partition(".")[0]
                    found |= set(DECIDES.get(option, DECIDES.get(root, ())[:1] if "." in option else ()))
            found |= {key for (_, key), different in values.items() if len(different) > 1}
        return found

    def _add(self, subject: Subject, differ: Mapping[str, Mapping[str, str]], asked: set[str]) -> None:
        rows: dict[tuple[Any, ...], Row] = {}
        for scored in subject.records:
            recipe = _recipe(scored.record)
            step = scored.record.protocol.get("recipe", {})
            step = step.get("training_steps") if isinstance(step, dict) else None
            if step is None and subject.run is not None and scored.record is subject.run.last:
                step = subject.run.step
            named = {name_of(option) for option in subject.options}
            options = subject.options | {
                OWN_NAMES.get(key, key): differ[key][shortened(recipe[key], None)]
                for key in sorted(differ)
                if key in recipe and not named & {name for name, keys in DECIDES.items() if key in keys}
            }
            row = rows.setdefault((step, *sorted(options.items())), Row(subject, step, options))
            row.records.append(scored)
            row.evaluations = row.evaluations or _evaluations(scored.record)
            for score, value in scored.record.scores.items():
                column = column_of(scored.record, score, subject.run, asked)
                row.cells.setdefault(column, Cell(value, scored, *interval_of(scored.record, score)))
        self.rows += rows.values() or [Row(subject, None, subject.options)]

    def lead(self, score: str | None = None) -> Column | None:
        """The column that answers the question: that of the given score, or the first of generated images.

        Raises:
            UserError: no row has this score.
        """
        names = list(dict.fromkeys(column.score for column in self.columns))
        if score is not None and score not in names:
            raise UserError(f"score={score}: no such score; there is {', '.join(names) or 'none'}")
        first = [next(iter(row.cells), None) for row in self.rows if row.cells]
        wanted = score or next((column.score for column in first if column is not None), None)
        return next((column for column in self.columns if column.score == wanted), None)

    def differences(self, columns: Sequence[Column]) -> dict[Column, dict[str, str]]:
        """For each of several columns of one score, the entries of the protocol in which they differ."""
        entries = [dict(column.protocol or ()) for column in columns]
        keys = dict.fromkeys(key for each in entries for key in each)
        differ = [key for key in keys if len({each.get(key) for each in entries}) > 1]
        short = {key: concise({each[key] for each in entries if key in each}) for key in differ}
        return {
            column: {key: short[key].get(each.get(key, ABSENT), ABSENT) for key in differ}
            if column.protocol is not None
            else {"protocol": "unknown"}
            for column, each in zip(columns, entries, strict=True)
        }


def name_of(option: str) -> str:
    """The name of an override, e.g. "sampler.steps" of "sampler.steps=10"."""
    return option.partition("=")[0].lstrip("+~")


def in_words(options: Mapping[str, str]) -> str:
    """Options as a short text: values that speak for themselves without their name, e.g. "cosine, lr 0.001"."""
    values = Counter(options.values())
    return ", ".join(
        value
        if value[:1].isalpha() and value.lower() not in UNCLEAR and values[value] == 1
        else f"{name.rpartition('.')[2]} {value}"
        for name, value in options.items()
    )


def natural(text: str) -> tuple[Any, ...]:
    """A key that sorts numbers in texts by their value."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", text)
    return tuple((0, float(part), "") if i % 2 else (1, 0.0, part) for i, part in enumerate(parts))


def concise(values: Iterable[str]) -> dict[str, str]:
    """Short texts for values such as "DDIM(eta=0.0, ...)": only the arguments in which those of one class differ."""
    parts = {value: re.fullmatch(r"(\w+)\((.*)\)", value) for value in values}
    classes: dict[str, list[list[str]]] = {}
    for match in parts.values():
        if match:
            classes.setdefault(match[1], []).append(re.split(r", (?=\w+=)", match[2]))
    short = {}
    for value, match in parts.items():
        words = [] if match is None else re.split(r", (?=\w+=)", match[2])
        kept = [word for word in words if any(word not in other for other in classes[match[1]])]
        text = value if match is None else match[1] + (f"({', '.join(kept)})" if kept else "")
        short[value] = shortened(text)
    return short


def shortened(value: Any, longest: int | None = LONGEST) -> str:
    """A value as a text of at most `longest` characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text.rpartition(".")[2] if re.fullmatch(r"(\w+\.)+[A-Z]\w*", text) else text
    return text if longest is None or len(text) <= longest else f"{text[: longest - 1]}…"


def interval_of(record: Record, score: str) -> tuple[float | None, float | None]:
    """The interval of a score in its record, if it has one."""
    intervals = getattr(record, "intervals", None) or {}
    found = intervals.get(score)
    if isinstance(found, Mapping):
        found = (found.get("low"), found.get("high"))
    if isinstance(found, list | tuple) and len(found) == 2 and all(isinstance(v, int | float) for v in found):
        return found[0], found[1]
    return None, None


def column_of(record: Record, score: str, run: Run | None, asked: set[str]) -> Column:
    """The column in which a score belongs."""
    if score.startswith("val/"):
        if run is None or not run.options:
            return Column(score, None)
        groups = {key: shortened(v) for key, v in run.options.items() if key.partition(".")[0] in LOSS_GROUPS}
        return Column(score, tuple(sorted(groups.items())))
    if not record.protocol:
        return Column(score, None)
    entries = {}
    for name, value in record.protocol.items():
        if name in ("reference", "features", "settings") and isinstance(value, dict):
            # of several scores in one record, each has an entry of its own
            value = value if _is_single(record) else value.get(_family(score, value), value)
        entries |= flat({name: value})
    per_class = record.protocol.get("per_class")
    base, _, label = score.partition("/class_")
    if label and isinstance(per_class, dict):
        entries |= flat(per_class.get(base, {}).get(label, {}), "per_class_of_this")
    kept = {
        key: shortened(value, None)
        for key, value in entries.items()
        if not IMMATERIAL.fullmatch(key) and key.removeprefix("recipe.") not in asked
    }
    return Column(score, tuple(sorted(kept.items())))


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


def _recipe(record: Record) -> dict[str, Any]:
    recipe = record.protocol.get("recipe")
    return recipe if isinstance(recipe, dict) else {}


def _evaluations(record: Record) -> int | None:
    found = _recipe(record).get("network_evaluations")
    return found if isinstance(found, int) and found > 0 else None


def differing_options(subjects: Sequence[Subject]) -> list[dict[str, str]]:
    """The options that differ between subjects, by name.

    Those of a sweep as they were typed. Otherwise those in which the configurations differ: a group whose class
    differs is one option, named by the class.
    """
    if all(subject.run is not None and subject.run.varied for subject in subjects):
        sweeps = {subject.run.folder.parent for subject in subjects}
        if len(sweeps) == 1:
            return [dict(_split(option) for option in subject.run.varied) for subject in subjects]
    found: list[dict[str, str]] = [{} for _ in subjects]
    known = [
        (place, subject.run.options)
        for place, subject in enumerate(subjects)
        if subject.run is not None and subject.run.options
    ]
    keys = dict.fromkeys(key for _, options in known for key in options if not INCIDENTAL.fullmatch(key))
    differ = [key for key in keys if len({repr(options.get(key)) for _, options in known}) > 1]
    classes = {key.removesuffix("_target_") for key in differ if key.endswith("_target_")}
    for place, options in known:
        for key in differ:
            part = min((part for part in classes if key.startswith(part)), key=len, default=None)
            if part is None:
                found[place][key] = shortened(options[key]) if options.get(key) is not None else ABSENT
            else:
                found[place][part.rstrip(".")] = _described(part, options, [other for _, other in known])
    return found


def _split(option: str) -> tuple[str, str]:
    name, _, value = option.lstrip("+").partition("=")
    return name, value


def _described(part: str, options: Mapping[str, Any], every: Sequence[Mapping[str, Any]]) -> str:
    """A part by its class, and by those of its arguments that differ between runs with the same class."""
    target = options.get(f"{part}_target_")
    if target is None:
        return ABSENT
    same = [other for other in every if other.get(f"{part}_target_") == target]
    keys = dict.fromkeys(key for other in same for key in other if key.startswith(part))
    differ = [key for key in keys if len({repr(other.get(key)) for other in same}) > 1]
    words = ", ".join(f"{key.removeprefix(part)}={shortened(options.get(key))}" for key in differ)
    return shortened(str(target)) + (f"({words})" if words else "")

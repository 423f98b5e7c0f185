"""Runs and records side by side: which options differ, and which scores may stand in one column.

Two scores share a column if they are computed in the same way (images, reference, features, settings, rounding) from
images that are made in the same way (weights, sampler, spacing, steps, guidance, clipping, labels, noise). What a sweep
varies, or what differs between several samplings of one checkpoint, are options: a difference between rows.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from src.errors import UserError
from src.report.protocol import Column, column_of, evaluations_of, interval_of, recipe_of
from src.report.subjects import Scored, Subject, name_of, split_option
from src.report.texts import ABSENT, concise, natural, shortened

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
    r"(ckpt|runs|name|cache|sweep|rerun_failed|launcher|logger|allow_changes|trust|workers|labels|prompts|hydra"
    r"|metrics|per_class|validate_every|trainer\.accelerator"
    r"|callbacks\.(progress|curves|checkpoints|sample_images|track_fidelity|skip_nonfinite))(\..*)?"
)
OWN_NAMES = {"seed": "sampling seed"}  # of a recipe; the option `seed` of a training is another one
AGAIN = "record"  # numbers records that differ in no option
SEEDS = ("seed", "generation.seed", "sampling seed", AGAIN)  # tell repetitions of a setting apart


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
        asked, several = self._asked()
        recipes = [recipe_of(scored.record) for subject in self.subjects for scored in subject.records]
        values = {key: {shortened(recipe[key], None) for recipe in recipes if key in recipe} for key in asked}
        differ = {key: concise(texts) for key, texts in values.items() if len(texts) > 1}
        self.rows: list[Row] = []
        for subject in self.subjects:
            self._add(subject, differ, asked, several)
        order = Counter(column for row in self.rows for column in row.cells)
        self.columns = sorted(order, key=lambda column: (column.score.startswith("val/"), -order[column]))
        names = dict.fromkeys(name for row in self.rows for name in row.options)
        self.options = {
            name: sorted({row.options.get(name, ABSENT) for row in self.rows}, key=natural) for name in names
        }

    def _asked(self) -> tuple[set[str], set[str]]:
        """The entries of the recipe that are options of this comparison: varied by a sweep, or for one checkpoint.

        Returns:
            All of them, and those with several values for one checkpoint.
        """
        found: set[str] = set()
        several: set[str] = set()
        for subject in self.subjects:
            values: dict[tuple[Any, str], set[str]] = {}
            for scored in subject.records:
                recipe = recipe_of(scored.record)
                for key in recipe.keys() - {"training_steps", "network_evaluations"}:
                    values.setdefault((recipe.get("training_steps"), key), set()).add(repr(recipe[key]))
                for option in map(name_of, scored.options):
                    root = option.partition(".")[0]
                    found |= set(DECIDES.get(option, DECIDES.get(root, ())[:1] if "." in option else ()))
            several |= {key for (_, key), different in values.items() if len(different) > 1}
        return found | several, several

    def _add(
        self, subject: Subject, differ: Mapping[str, Mapping[str, str]], asked: set[str], several: set[str]
    ) -> None:
        """Adds the rows of a subject.

        An entry of the recipe that an option of the subject decides is left out, unless a checkpoint has several
        values. Records that differ in no option, but in a score, have rows of their own, numbered by the option
        `record`.
        """
        trained = {option for each in self.subjects for option in each.options}
        rows: dict[tuple[Any, ...], Row] = {}
        for scored in subject.records:
            recipe = recipe_of(scored.record)
            step = scored.record.protocol.get("recipe", {})
            step = step.get("training_steps") if isinstance(step, dict) else None
            if step is None and subject.run is not None and scored.record is subject.run.last:
                step = subject.run.step
            named = {name_of(option) for option in subject.options}
            decided = {key for name in named for key in DECIDES.get(name, ())} - several
            options = dict(subject.options)
            for key in sorted((differ.keys() & recipe.keys()) - decided):
                name = OWN_NAMES.get(key, f"sampling {key}" if key in trained else key)
                options[name] = differ[key][shortened(recipe[key], None)]
            cells = {}
            for score, value in scored.record.scores.items():
                column = column_of(scored.record, score, subject.run, asked)
                cells[column] = Cell(value, scored, *interval_of(scored.record, score))
            for number in count(1):
                numbered = options | ({AGAIN: str(number)} if number > 1 else {})
                row = rows.setdefault((step, *sorted(numbered.items())), Row(subject, step, numbered))
                known = [(row.cells[column], cell) for column, cell in cells.items() if column in row.cells]
                if all(repr(one.value) == repr(other.value) for one, other in known):  # NaN equals NaN
                    break
            row.records.append(scored)
            row.evaluations = row.evaluations or evaluations_of(scored.record)
            for column, cell in cells.items():
                row.cells.setdefault(column, cell)
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


def are_of_one_sweep(subjects: Sequence[Subject]) -> bool:
    """Whether all subjects are jobs of the same sweep."""
    parents = {subject.folder.parent if subject.varied else None for subject in subjects}
    return len(parents) == 1 and None not in parents


def differing_options(subjects: Sequence[Subject]) -> list[dict[str, str]]:
    """The options that differ between subjects, by name.

    Those of a sweep as they were typed. Otherwise those in which the configurations differ: a group whose class
    differs is one option, named by the class.
    """
    if are_of_one_sweep(subjects):
        return [dict(split_option(option) for option in subject.varied) for subject in subjects]
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

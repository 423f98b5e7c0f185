"""What is compared: the runs and records at some places."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.evaluation.record import Record
from src.report.run import OUTCOME_FILE, Run, find_runs, inside, is_run, jobs_of, read_run
from src.report.texts import in_words
from src.runs.files import Damaged, read_json
from src.runs.folder import SCORES_FILE, check_contained


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

    @property
    def folder(self) -> Path:
        """The run folder, or that of the record."""
        return self.run.folder if self.run else self.records[0].path.parent

    @property
    def varied(self) -> tuple[str, ...]:
        """Of the job of a sweep, the options that differ between the jobs."""
        return self.run.varied if self.run else self.records[0].options


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
                different = {repr(scored.record): scored for scored in (*known.records, *subject.records)}
                known.records = list(different.values())
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
        different: dict[Any, Scored] = {}
        for path in sorted(place.glob(f"**/{SCORES_FILE}")):
            record = Record.read(path)
            # a job of a sweep has a copy; without a protocol, equal numbers may mean different things
            different.setdefault(repr(record) if record.protocol else path, Scored(record, path))
        for scored in different.values():
            yield Subject(scored.path.parent.name, None, [scored])


def _further_records(run: Run) -> list[Scored]:
    """The records of `src.evaluate` in a run folder."""
    found: list[Scored] = []
    try:
        check_contained(run.folder, ["scores"])
    except UserError as error:
        run.problems.append(str(error))
        return found
    for path in sorted((run.folder / "scores").glob(f"*/{SCORES_FILE}")):
        try:
            found.append(Scored(Record.read(path), path))
        except UserError as error:
            run.problems.append(str(error))
    return found


def _evaluated(sweep: Path, jobs: Sequence[Mapping[str, Any]]) -> Iterator[Subject]:
    """The runs that a sweep of `src.evaluate` has scored, each with the records that the sweep made.

    A job with given images, or with a run that is gone, is a subject by itself.
    """
    subjects: dict[Path, Subject] = {}
    further: dict[Path, list[Scored]] = {}
    for job in jobs:
        own = inside(sweep, job["folder"])
        place = next((o.partition("=")[2] for o in job["overrides"] if o.startswith("run=")), "")
        path = Path(place.strip("'\"")).expanduser()
        folder = path.parent.parent if path.suffix == ".ckpt" else path
        if not place or not is_run(folder):
            folder = own
        if folder not in subjects:
            run = None if folder == own else read_run(folder)
            subjects[folder] = Subject(folder.name, run, [])
            further[folder] = _further_records(run) if run else []
        subject = subjects[folder]
        try:
            made = _record_of(own, further[folder])
        except UserError as error:
            if subject.run is None:
                raise
            subject.run.problems.append(str(error))
            continue
        if made is not None:
            subject.records.append(Scored(made.record, made.path, tuple(job["varied"])))
    yield from (subject for subject in subjects.values() if subject.run or subject.records)


def _record_of(job: Path, further: Sequence[Scored]) -> Scored | None:
    """The record in a job's folder; of a job of earlier versions, that of its run with the same scores.

    Raises:
        UserError: the record cannot be read.
    """
    path = job / SCORES_FILE
    if path.exists():
        check_contained(job.parent, [f"{job.name}/{SCORES_FILE}"])
        return Scored(Record.read(path), path)
    try:
        scores = read_json(job / OUTCOME_FILE, dict[str, Any]).get("scores")
    except (FileNotFoundError, Damaged):
        return None
    return next((each for each in further if _same(each.record.scores, scores)), None)


def _same(scores: Mapping[str, float], found: Any) -> bool:
    """Whether an outcome has the scores of a record; it may have further numbers, and NaN equals NaN."""
    return isinstance(found, dict) and all(
        repr(found.get(name)) == repr(value) for name, value in scores.items()
    )


def _name_apart(subjects: list[Subject]) -> None:
    for subject in subjects:
        run = subject.run
        if subject.varied:
            number = subject.folder.name.partition("_")[0]
            subject.name = f"{number}: {in_words(dict(split_option(option) for option in subject.varied))}"
        elif run and isinstance(run.options.get("name"), str):
            subject.name = run.options["name"]
    for _ in range(2):
        counts = Counter(subject.name for subject in subjects)
        for subject in subjects:
            if counts[subject.name] > 1:
                subject.name = f"{subject.folder.parent.name}/{subject.folder.name}"


def name_of(option: str) -> str:
    """The name of an override, e.g. "sampler.steps" of "sampler.steps=10"."""
    return option.partition("=")[0].lstrip("+~")


def split_option(option: str) -> tuple[str, str]:
    """The name and the value of an override."""
    name, _, value = option.lstrip("+").partition("=")
    return name, value

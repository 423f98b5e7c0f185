"""A search over the options of a sweep with Optuna.

The options with several values are those of a sweep: lists are choices, `interval(a,b)` and `range(a,b)` are numbers,
`tag(log,interval(a,b))` is on a logarithmic scale. Values of `seed` are not searched: each trial runs once for each of
them, and its objectives are means. A trial is made of jobs like those of a sweep, so that all launchers run it. The
study lies in the sweep's folder, and the same command continues it:

    <sweep>/study.jsonl                 Optuna's journal
    <sweep>/<number>_<what differs>     the folder of a job; job i of trial k has number k * seeds + i
    <sweep>/search.json                 the trials, and which of them are best
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.app.messages import parsed
from src.app.sweep.jobs import Job, Sweep, folder_name, option_of
from src.errors import UserError
from src.runs.files import write_atomically, write_json
from src.runs.folder import check_contained
from src.training.study import STUDY, STUDY_FILE, TRIAL_FILE, median_pruner, repair, storage_of

log = logging.getLogger(__name__)

SEARCH_FILE = "search.json"
SCORE, EVALUATIONS = "score", "evaluations"


class HparamsSearch:
    """A search with Optuna's tree-structured Parzen estimator (Bergstra et al. 2011).

    Draws are keyed by (seed, number of the trial), so that a search that is stopped and continued tries the same
    settings, if its trials run one after the other. With one objective, trainings are pruned by the median rule, which
    compares the scores of the first seed; the other seeds run only for trials that were not pruned.

    Args:
        trials: settings that are tried in all, with those that are pruned or fail.
        objectives: "score" for the monitored score, "evaluations" for evaluations of the network for an image, or names
            of scores or validation losses. Several give the trials that no other one beats in all of them.
        maximize: those of the named objectives of which more is better; of "score" it is known.
        prune: whether to stop trainings that are worse than the median.
        prune_after: trials that run to their end before any is pruned.
        at_once: trials at once; None for as many as the launcher runs jobs.
        seed: of the search.
        space: options and their values, as on the command line, which takes precedence.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        trials: int = 20,
        objectives: list[str] | None = None,
        maximize: list[str] | None = None,
        prune: bool = True,
        prune_after: int = 5,
        at_once: int | None = None,
        seed: int = 0,
        space: dict[str, str] | None = None,
    ):
        for name, number, least in (
            ("trials", trials, 1),
            ("prune_after", prune_after, 0),
            ("seed", seed, 0),
        ):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        if at_once is not None and at_once < 1:
            raise ValueError(f"at_once must be at least 1 or null, got {at_once}")
        self.trials, self.prune_after, self.at_once, self.seed = trials, prune_after, at_once, seed
        self.objectives, self.maximize = list(objectives or [SCORE]), list(maximize or [])
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives must differ, got {self.objectives}")
        if not set(self.maximize) <= set(self.objectives) - {SCORE, EVALUATIONS}:
            raise ValueError(f"maximize={self.maximize}: give names that are in objectives={self.objectives}")
        self.prune = prune and len(self.objectives) == 1 and self.objectives != [EVALUATIONS]
        self.space = space or {}

    def directions(self, higher_is_better: bool) -> list[str]:
        """Optuna's direction of each objective.

        Args:
            higher_is_better: whether it is for the monitored score.
        """
        more = {*self.maximize, *([SCORE] if higher_is_better else [])}
        return ["maximize" if name in more else "minimize" for name in self.objectives]

    def values(self, scores: Mapping[str, float]) -> list[float]:
        """The objectives among the scores of a job, of which the first is the monitored one.

        Raises:
            UserError: one is missing.
        """
        found = []
        for name in self.objectives:
            chosen = next(iter(scores), name) if name == SCORE else name
            if chosen not in scores:
                raise UserError(
                    f"hparams_search.objectives: no {name} in the scores of a job; there is"
                    f" {', '.join(scores) or 'none'}"
                )
            found.append(scores[chosen])
        return found

    def finished(self, folder: Path) -> bool:
        """Whether the study in a folder has all its trials."""
        if not (folder / STUDY_FILE).is_file():
            return False
        trials = _study(folder).trials
        return len(trials) >= self.trials and all(trial.state.is_finished() for trial in trials)


@dataclass(frozen=True)
class Space:
    """What the command line of a search says.

    Attributes:
        fixed: options with one value.
        seeds: the values of `seed`, as options; one empty tuple if it has one value.
        searched: for each option with several values, Optuna's distribution.
    """

    fixed: tuple[str, ...]
    seeds: tuple[tuple[str, ...], ...]
    searched: dict[str, Any]

    def example(self) -> tuple[str, ...]:
        """The options of one setting."""
        values = {name: d.low if hasattr(d, "low") else d.choices[0] for name, d in self.searched.items()}
        return (*self.fixed, *(f"{name}={value}" for name, value in values.items()), *self.seeds[0])


def space_of(overrides: Sequence[str], search: HparamsSearch) -> Space:
    """The space of a search.

    Args:
        overrides: options of the command line.
        search: gives further ones.

    Raises:
        UserError: an option has an impossible range, or none has several values.
    """
    given = {option_of(override) for override in overrides}
    preset = [f"{name}={value}" for name, value in search.space.items() if option_of(name) not in given]
    fixed: list[str] = []
    seeds: tuple[tuple[str, ...], ...] = ((),)
    searched = {}
    for override in parsed([*preset, *overrides]):
        if not override.is_sweep_override():
            fixed.append(override.input_line)
        elif override.key_or_group == "seed" and override.is_discrete_sweep():
            seeds = tuple((f"seed={value}",) for value in override.sweep_string_iterator())
        else:
            searched[override.get_key_element()] = _distribution(override)
    if not searched:
        raise UserError(
            "hparams_search: no option to search; give several values or an interval, e.g."
            " 'optimizer.lr=tag(log,interval(1e-4,1e-2))' schedule=linear,cosine"
        )
    return Space(tuple(fixed), seeds, searched)


def _distribution(override: Any) -> Any:
    """Optuna's distribution of the values of an option."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values = override.value()
    is_log = "log" in getattr(values, "tags", ())
    try:
        if override.is_interval_sweep():
            low, high, step = values.start, values.end, None
        elif override.is_range_sweep():
            numbers = [float(number) for number in values.range()]
            low, high, step = min(numbers), max(numbers), abs(float(values.step))
            if all(number.is_integer() for number in (low, step)):
                low, high, step = int(low), int(high), int(step)
        else:
            return CategoricalDistribution(list(override.sweep_string_iterator()))
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=is_log, step=1 if is_log else step or 1)
        return FloatDistribution(float(low), float(high), log=is_log, step=None if is_log else step)
    except ValueError as error:
        raise UserError(f"{override.input_line}: {str(error).splitlines()[0]}") from None


class SearchedSweep(Sweep):
    """A sweep whose jobs are those of the trials so far.

    Args:
        entry_point: "train", "sample" or "evaluate".
        folder: the sweep's folder.
        overrides: the options of the command line that identify the search.
        space: made of them.
        search: the search.
        higher_is_better: whether it is for the monitored score.
    """

    def __init__(
        self,
        entry_point: str,
        folder: Path,
        overrides: Sequence[str],
        space: Space,
        search: HparamsSearch,
        higher_is_better: bool,
    ):
        self.entry_point, self.folder, self.overrides = entry_point, folder, list(overrides)
        self.space, self.search = space, search
        self.directions = search.directions(higher_is_better)
        self.jobs: list[Job] = []

    def run(self, launcher: Any, ready: Callable[[Sequence[Job]], list[Job]]) -> None:
        """Runs trials until there are as many as were ordered.

        Args:
            launcher: runs their jobs.
            ready: the jobs that can run; the others have an outcome afterwards.

        Raises:
            SystemExit: as the launcher.
        """
        repair(self.folder)
        study = _study(self.folder, self.directions, self.search)
        self.jobs = [job for trial in study.trials for job in self._jobs_of(study, trial.number)]
        killed: set[int] = set()
        while True:
            current = [t.number for t in study.trials if not t.state.is_finished() and t.number not in killed]
            at_once = self.search.at_once or launcher.at_once
            new = min(at_once - len(current), self.search.trials - len(study.trials))
            current += [self._ask(study) for _ in range(new)]
            if not current:
                return
            jobs = {number: self._jobs_of(study, number) for number in current}
            known = {job.number for job in self.jobs}
            self.jobs += [job for each in jobs.values() for job in each if job.number not in known]
            self.write()
            total = self.search.trials * len(self.space.seeds)
            launcher.run(ready([each[0] for each in jobs.values() if each[0].outcome() is None]), total)
            going = [
                n for n in current if "scores" in (jobs[n][0].outcome() or {}) and not _pruned_at(study, n)
            ]
            others = [job for n in going for job in jobs[n][1:] if job.outcome() is None]
            if others:
                launcher.run(ready(others), total)
            killed |= {number for number in current if not self._tell(study, number, jobs[number])}
            _print_progress(study, self.search)

    def _ask(self, study: Any) -> int:
        """The number of a new trial."""
        study.sampler = _sampler(self.search.seed, len(study.trials))
        return study.ask(self.space.searched).number

    def _jobs_of(self, study: Any, number: int) -> list[Job]:
        """The jobs of a trial, one for each seed; the first reports to the study."""
        from optuna.trial import Trial

        frozen = study.trials[number]
        if frozen.params.keys() != self.space.searched.keys():  # killed while it was made
            study.sampler = _sampler(self.search.seed, number)
            trial = Trial(study, frozen._trial_id)
            for name, distribution in self.space.searched.items():
                trial._suggest(name, distribution)
            frozen = study.trials[number]
        chosen = [f"{name}={frozen.params[name]}" for name in self.space.searched]
        jobs = []
        for place, seed in enumerate(self.space.seeds):
            varied = (*chosen, *seed)
            folder = self.folder / f"{number * len(self.space.seeds) + place}_{folder_name(','.join(varied))}"
            jobs.append(Job(self.entry_point, folder, (*self.space.fixed, *varied), varied))
        if self.search.prune and self.entry_point == "train" and not frozen.state.is_finished():
            objective, after = self.search.objectives[0], self.search.prune_after
            check_contained(self.folder, [jobs[0].folder.name])
            content = {"trial": number, "objective": objective, "prune_after": after}
            write_json(jobs[0].folder / TRIAL_FILE, content)
        return jobs

    def _tell(self, study: Any, number: int, jobs: Sequence[Job]) -> bool:
        """Ends a trial in the study; False if one of its jobs has no outcome, since it was killed."""
        from optuna.trial import TrialState

        outcomes = [job.outcome() for job in jobs]
        error = next((outcome["error"] for outcome in outcomes if outcome and "error" in outcome), None)
        if error is not None:
            storage = study._storage
            storage.set_trial_user_attr(study.trials[number]._trial_id, "error", error)
            study.tell(number, state=TrialState.FAIL)
        elif _pruned_at(study, number) and outcomes[0]:
            study.tell(number, state=TrialState.PRUNED)
        elif None in outcomes:
            return False
        else:
            each = [self.search.values(outcome["scores"]) for outcome in outcomes]
            means = [math.fsum(values) / len(values) for values in zip(*each, strict=True)]
            failed = not all(map(math.isfinite, means))
            study.tell(number, **({"state": TrialState.FAIL} if failed else {"values": means}))
        return True

    def unfinished(self) -> int:
        """How many jobs have failed, and how many trials were killed; trials that were pruned have ended."""
        rows = trials_of(_study(self.folder, self.directions, self.search))
        killed = sum(row["state"] == "running" for row in rows)
        return killed + sum("error" in outcome for outcome in self.outcomes().values())

    def print_trials(self) -> None:
        """Prints the trials and the best of them, and writes search.json."""
        study = _study(self.folder, self.directions, self.search)
        rows = trials_of(study)
        content = {"objectives": self.search.objectives, "directions": self.directions, "trials": rows}
        write_atomically(self.folder / SEARCH_FILE, (json.dumps(content, indent=2) + "\n").encode())
        _print_table(self.folder, self.search, rows, self.directions)


def trials_of(study: Any) -> list[dict[str, Any]]:
    """The trials of a study: number, state, params, values, `best`, and `pruned_at` or `error`.

    `best` marks the best trial; with several objectives those that no other one beats in all of them.
    """
    from optuna.trial import TrialState

    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    best = {trial.number for trial in study.best_trials} if complete else set()
    return [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "params": trial.params,
            "values": trial.values,
            "best": trial.number in best,
            **{name: trial.user_attrs[name] for name in ("pruned_at", "error") if name in trial.user_attrs},
        }
        for trial in study.trials
    ]


def _study(folder: Path, directions: list[str] | None = None, search: HparamsSearch | None = None) -> Any:
    """The study in a folder; a new one if there is none."""
    storage = storage_of(folder)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = median_pruner(search.prune_after) if search else None
    if directions is None:
        return optuna.load_study(study_name=STUDY, storage=storage)
    return optuna.create_study(
        study_name=STUDY, storage=storage, directions=directions, pruner=pruner, load_if_exists=True
    )


def _sampler(seed: int, number: int) -> Any:
    """What chooses the setting of a trial, keyed by its number."""
    from optuna.samplers import TPESampler

    from src.randomness import key

    return TPESampler(seed=key(seed, "search", number) % 2**32)


def _pruned_at(study: Any, number: int) -> int | None:
    return study.trials[number].user_attrs.get("pruned_at")


def _print_progress(study: Any, search: HparamsSearch) -> None:
    rows = trials_of(study)
    done = sum(row["state"] != "running" for row in rows)
    best = [row for row in rows if row["best"]]
    found = f"{len(best)} of them best" if len(search.objectives) > 1 else ""
    if best and not found:
        found = f"best {search.objectives[0]} {best[0]['values'][0]:.4g} in trial {best[0]['number']}"
    print(f"trials      {done} of {search.trials}; {found or 'none with a score yet'}")


def _print_table(
    folder: Path, search: HparamsSearch, rows: Sequence[dict[str, Any]], directions: Sequence[str]
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 160)
    table = Table(
        "", "trial", "options", *search.objectives, "", title=escape(f"{folder} ({len(rows)} trials)")
    )
    several = len(search.objectives) > 1
    signs = [-1 if direction == "maximize" else 1 for direction in directions]

    def best_first(row: dict[str, Any]) -> tuple[Any, ...]:
        values = [s * v for s, v in zip(signs, row["values"] or (), strict=False)]
        return row["values"] is None, row["state"] == "pruned", *values

    for row in sorted(rows, key=best_first):
        options = " ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in row["params"].items()
        )
        cells = [f"{value:.4g}" for value in row["values"] or ()] or [""] * len(search.objectives)
        said = {
            "pruned": f"pruned at step {row.get('pruned_at')}",
            "fail": f"failed: {row.get('error', 'not finite')}",
        }
        note = said.get(row["state"], "" if row["state"] == "complete" else "not run to its end")
        table.add_row("*" if row["best"] else "", str(row["number"]), escape(options), *cells, escape(note))
    console.print(table)
    if any(row["best"] for row in rows):
        console.print("* no other trial is better in all objectives" if several else "* the best trial")

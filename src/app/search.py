"""The job of `src.search`: the best recipe for one checkpoint, by successive halving on common noise."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from src.app.bench import Bench, Scored, own_options
from src.app.build import class_of, trusting
from src.app.environment import redacted
from src.app.evaluate import IMAGES
from src.app.overrides import trusted_packages, written_out
from src.app.sweep.jobs import combinations, option_of
from src.diffusion.guidance import ClassifierFree
from src.errors import UserError
from src.runs.files import digest_of, write_json
from src.training import post_hoc

OWN = ("budget",)
SMALLEST = 16
"""Images of the first rung, as a share 1 / SMALLEST of all."""
FEWEST = 30
"""Images of the first rung at least."""


@dataclass
class Candidate:
    """One combination.

    Attributes:
        options: all its options.
        varied: those that differ between combinations.
        cost: network evaluations for an image.
        scored: its latest score.
        error: why it is impossible.
    """

    options: tuple[str, ...]
    varied: tuple[str, ...]
    cost: int = 0
    scored: Scored | None = field(default=None, repr=False)
    error: str | None = None

    def row(self) -> dict[str, Any]:
        """The candidate for the record."""
        row: dict[str, Any] = {"options": list(self.varied), "evaluations": self.cost}
        if self.scored is not None:
            row |= {"n": self.scored.n, "value": self.scored.value, "interval": self.scored.interval}
        return row if self.error is None else row | {"error": self.error}


def search(arguments: Sequence[str]) -> int:
    """Searches the combinations of a command line and prints the best, with those that are not significantly worse.

    Args:
        arguments: the command line without the program's name.

    Returns:
        0.

    Raises:
        UserError: a mistake in the arguments, or no combination is possible.
    """
    own, overrides = own_options(arguments, OWN)
    try:
        budget = float(own.get("budget", 0.2))
    except ValueError:
        budget = math.nan
    if not 0 < budget <= 1:
        raise UserError(f"budget={own['budget']}: give a share of the full grid in (0, 1]")
    overrides = [part for argument in overrides for part in written_out(argument)]
    with trusting(trusted_packages(overrides)):
        usual = len(combinations(overrides)) < 2
        if usual:
            overrides += usual_grid(Bench(overrides), overrides)
        candidates = [Candidate(options, varied) for options, varied in combinations(overrides)]
        if usual:
            candidates = without_repeats(candidates)
        print(f"search      {len(candidates)} combinations")
        names = {option.partition("=")[0] for candidate in candidates for option in candidate.varied}
        if fixed := names & {"n", "seed", "run", "reference", "metrics", "bytes"}:
            raise UserError(f"{min(fixed)}: all combinations have one value of it; give one")
        fixed_options = [option for option in candidates[0].options if option not in candidates[0].varied]
        bench = Bench(fixed_options)
        n = bench.config().n or IMAGES
        halving(bench, candidates, n, budget)
        publish(bench, candidates, n, budget)
    return 0


def usual_grid(bench: Bench, given: Sequence[str]) -> list[str]:
    """Options with several values for a command line that has none: EMA length, guidance, interval, sampler, steps.

    Weights are varied if the run has averages. Guidance is varied if it is none or classifier-free: its options would
    replace another kind.

    Args:
        bench: the run.
        given: the options of the command line, which keep their values.
    """
    loaded, merged, config = bench.load()
    names = {option_of(option) for option in given}
    grid = {}
    if post_hoc.snapshots(loaded.found.folder / post_hoc.FOLDER):
        grid["weights"] = "0.05,0.1,0.15"
    elif loaded.weights not in ("raw", "imported"):
        grid["weights"] = "ema,raw"
    conditioning = loaded.recipe.conditioning
    if "guidance" in names:
        varies = class_of(config.guidance) is ClassifierFree
    else:
        kind = class_of(merged.guidance)
        varies = kind is None or (kind is ClassifierFree and not merged.guidance.get("rescale"))
    if varies and conditioning is not None and conditioning.dropout:
        grid |= {"guidance.scale": "1,1.5,2,3", "guidance.interval": "null,[0.2,5]"}
    grid |= {"sampler": "ddim,ddpm,dpmpp_2m", "sampler.steps": "10,20,50"}
    return [f"{name}={values}" for name, values in grid.items() if name not in names]


def without_repeats(candidates: Sequence[Candidate]) -> list[Candidate]:
    """One candidate for all intervals of classifier-free guidance with scale 1, which is none."""
    found: dict[tuple[str, ...], Candidate] = {}
    for candidate in candidates:
        key = candidate.options
        if "guidance.scale=1" in key:
            key = tuple(option for option in key if option_of(option) != "guidance.interval")
        found.setdefault(key, candidate)
    return list(found.values())


def halving(bench: Bench, candidates: list[Candidate], n: int, budget: float) -> None:
    """Scores the candidates with more and more images: on each rung twice as many, for as many as the budget allows.

    Args:
        bench: the run.
        candidates: the combinations; get their scores.
        n: images of the last rung.
        budget: share of the evaluations of the full grid.

    Raises:
        UserError: the first rung exceeds the budget, or no combination is possible.
    """
    sizes = rungs(n, fewest(bench, candidates)) if budget < 1 else [n]
    if sizes[0] > budget * n:
        share = math.ceil(100 * sizes[0] / n)
        raise UserError(
            f"budget={budget:g}: the first rung of {sizes[0]} images is {share} % of n={n}; give a larger n, or"
            f" budget={share / 100:g} or more"
        )
    alive = candidates
    allowed = math.inf
    for rung, size in enumerate(sizes):
        print(f"rung {rung + 1}/{len(sizes)}    {len(alive)} combinations, {size} images each", flush=True)
        for candidate in alive:
            try:
                candidate.scored = bench.score(candidate.varied, size)
                candidate.cost = candidate.scored.evaluations
            except UserError as error:
                candidate.error = redacted(str(error))
        alive = ranked(bench, [candidate for candidate in alive if candidate.error is None])
        if not alive:
            raise UserError(f"no combination is possible: {candidates[0].error}")
        if rung == 0:
            allowed = budget * n * sum(candidate.cost for candidate in alive)
        if rung + 1 < len(sizes):
            left = allowed - sum(c.scored.n * c.cost for c in candidates if c.scored)
            alive = affordable(alive, sizes[rung + 1 :], left)


def fewest(bench: Bench, candidates: Sequence[Candidate]) -> int:
    """The smallest number of images that the score takes."""
    for candidate in candidates:
        with suppress(UserError):  # reported with its score
            return bench.scores(*bench.load(candidate.varied)).monitored.smallest
    return FEWEST


def rungs(n: int, least: int = FEWEST) -> list[int]:
    """The numbers of images: n / 16, n / 8, ..., n, without those below `FEWEST` or `least`."""
    sizes = [n]
    while sizes[0] / 2 >= max(FEWEST, least, n / SMALLEST):
        sizes.insert(0, math.ceil(sizes[0] / 2))
    return sizes


def affordable(ordered: Sequence[Candidate], sizes: Sequence[int], left: float) -> list[Candidate]:
    """The best candidates that an equal share of the remaining budget takes to the next rung; one at least.

    Args:
        ordered: the candidates, the best first.
        sizes: the images of the next rung and of those after it.
        left: network evaluations that may still be spent.
    """
    now = ordered[0].scored.n
    # the best goes all the way; this is set aside
    spare = left - (sizes[-1] - now) * ordered[0].cost
    share = spare / len(sizes)
    chosen = [ordered[0]]
    for candidate in ordered[1 : max(1, math.ceil(len(ordered) / 2))]:
        price = (sizes[0] - now) * candidate.cost
        if price > share:
            break
        share -= price
        chosen.append(candidate)
    return chosen


def ranked(bench: Bench, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with a score, the best first."""
    higher = bench.higher_is_better
    return sorted(candidates, key=lambda c: -c.scored.value if higher else c.scored.value)


def publish(bench: Bench, candidates: list[Candidate], n: int, budget: float) -> None:
    """Prints and writes the result."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    full = ranked(bench, [c for c in candidates if c.scored and c.scored.n == n and c.error is None])
    best = full[0]
    name = next(iter(best.scored.record.scores))
    table = Table("options", name, "images", "evaluations", "difference to the best")
    others = ranked(bench, [c for c in candidates if c.scored and c.error is None and c.scored.n < n])
    for candidate in [*full, *sorted(others, key=lambda c: -c.scored.n)][:20]:
        difference = ""
        if candidate is not best and candidate.scored.n == n:
            change, half = candidate.scored.minus(best.scored)
            difference = f"{change:+.3g} ± {half:.2g}"
        table.add_row(
            escape(" ".join(candidate.varied)),
            candidate.scored.text(),
            str(candidate.scored.n),
            str(candidate.cost),
            difference,
        )
    for candidate in candidates:
        if candidate.error:
            table.add_row(escape(" ".join(candidate.varied)), f"[red]{escape(candidate.error)}")
    Console(width=None if Console().is_terminal else 180).print(table)
    used = sum(c.scored.n * c.cost for c in candidates if c.scored)
    grid = n * sum(c.cost for c in candidates if c.scored)
    loaded, _, _ = bench.load(best.varied)
    content = {
        "score": name,
        "n": n,
        "best": best.row(),
        "protocol": best.scored.record.protocol,
        "candidates": [candidate.row() for candidate in candidates],
        "network_evaluations": used,
        "of_the_full_grid": grid,
        "budget": budget,
    }
    path = loaded.found.folder / "scores" / f"search_{digest_of(content)}" / "search.json"
    write_json(path, content)
    print(
        f"best        {' '.join(best.varied)}: {name} {best.scored.text()}\n"
        f"cost        {used:,} network evaluations, {100 * used / grid:.1f} % of the full grid's {grid:,}"
        f" ({bench.bank.spent:,} of them now)\nwritten     {path}"
    )

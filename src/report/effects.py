"""What matters among options: means over seeds, and marginal means with intervals."""

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean of independent values.

    Attributes:
        value: the mean.
        half: half of its 95 % interval (Student's t); None for one value.
        count: the number of values.
    """

    value: float
    half: float | None
    count: int


@dataclass(frozen=True)
class Marginal:
    """The mean of a score over all settings with one value of an option.

    Attributes:
        option: e.g. "schedule".
        value: e.g. "cosine".
        mean: over seeds, of the mean over all other options.
        difference: from the option's best value, over the same seeds and other options; None for the best.
        results: how many results it is the mean of.
    """

    option: str
    value: str
    mean: Mean
    difference: Mean | None
    results: int


@dataclass(frozen=True)
class Result:
    """One score.

    Attributes:
        options: the options that differ between the results, without the seed.
        seed: what identifies the repetition.
        score: its value.
    """

    options: Mapping[str, str]
    seed: str
    score: float


def mean(values: Sequence[float]) -> Mean:
    """The mean of at least one value, with its interval."""
    from scipy.special import stdtrit

    n = len(values)
    average = math.fsum(values) / n
    if n < 2:
        return Mean(average, None, n)
    deviation = math.sqrt(math.fsum((value - average) ** 2 for value in values) / (n - 1))
    return Mean(average, float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * deviation / math.sqrt(n), n)


def marginal_means(results: Sequence[Result], higher_is_better: bool = False) -> list[Marginal]:
    """The marginal mean of each value of each option, the best value of an option first.

    Only complete blocks count: seeds and other options for which there is a result with every value of the option.
    Otherwise a value whose worst settings failed would look better than it is. An option without a complete block is
    left out.
    """
    rows = []
    for option in dict.fromkeys(name for result in results for name in result.options):
        blocks: dict[Hashable, dict[str, float]] = defaultdict(dict)
        for result in results:
            others = frozenset((k, v) for k, v in result.options.items() if k != option)
            blocks[others, result.seed][result.options.get(option, "")] = result.score
        values = {value for block in blocks.values() for value in block}
        complete = {key: block for key, block in blocks.items() if len(block) == len(values)}
        if len(values) < 2 or not complete:
            continue
        means = {
            value: _over_seeds({key: block[value] for key, block in complete.items()}) for value in values
        }
        order = sorted(values, key=lambda value: means[value].value, reverse=higher_is_better)
        for value in order:
            gaps = {key: block[value] - block[order[0]] for key, block in complete.items()}
            difference = None if value == order[0] else _over_seeds(gaps)
            rows.append(Marginal(option, value, means[value], difference, len(complete)))
    return rows


def _over_seeds(blocks: Mapping[tuple[Hashable, str], float]) -> Mean:
    """The mean over seeds of the means of the blocks of a seed."""
    seeds = defaultdict(list)
    for (_, seed), value in blocks.items():
        seeds[seed].append(value)
    return mean([math.fsum(values) / len(values) for values in seeds.values()])


def digits(value: float | None, half: float | None = None) -> str:
    """A number with as many digits as half of its interval allows: two of the interval's; four without interval."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else str(value)
    if half is None or not math.isfinite(half):
        return f"{value:.4g}"
    if half <= 1e-6 * abs(value):
        return f"{value:.6g}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(half)))}f}"

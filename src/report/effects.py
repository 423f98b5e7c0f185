"""What matters among options: means over seeds, and marginal means with intervals."""

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

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
class Interaction:
    """What the sum of the effects of two options does not explain.

    Attributes:
        options: two options, each with a value, e.g. (("schedule", "cosine"), ("parameterization", "v")).
        mean: of the scores with both values; over seeds, of the mean over all other options.
        effect: the mean with both values - the mean with the first - the mean with the second + the mean of all; 0 if
            the options act independently.
        results: how many results the mean is of.
    """

    options: tuple[tuple[str, str], tuple[str, str]]
    mean: Mean
    effect: Mean
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
    average = _average(values)
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
        values, complete = _complete(results, (option,))
        if len(values) < 2 or not complete:
            continue
        means = {
            value: _over_seeds({key: block[value] for key, block in complete.items()}) for value in values
        }
        order = sorted(values, key=lambda value: means[value].value, reverse=higher_is_better)
        for value in order:
            gaps = {key: block[value] - block[order[0]] for key, block in complete.items()}
            difference = None if value == order[0] else _over_seeds(gaps)
            rows.append(Marginal(option, value[0], means[value], difference, len(complete)))
    return rows


def interactions(results: Sequence[Result]) -> list[Interaction]:
    """The interaction of each pair of values of every two options, over complete blocks as in `marginal_means`."""
    rows = []
    for names in combinations(dict.fromkeys(name for result in results for name in result.options), 2):
        pairs, complete = _complete(results, names)
        if any(len({pair[place] for pair in pairs}) < 2 for place in (0, 1)) or not complete:
            continue
        for pair in pairs:
            effects = {}
            for key, block in complete.items():
                first, second = (
                    [score for other, score in block.items() if other[place] == pair[place]]
                    for place in (0, 1)
                )
                effects[key] = block[pair] - _average(first) - _average(second) + _average([*block.values()])
            both = _over_seeds({key: block[pair] for key, block in complete.items()})
            options = ((names[0], pair[0]), (names[1], pair[1]))
            rows.append(Interaction(options, both, _over_seeds(effects), len(complete)))
    return rows


Values = tuple[str, ...]
Blocks = dict[tuple[Hashable, str], dict[Values, float]]


def _complete(results: Sequence[Result], names: Sequence[str]) -> tuple[list[Values], Blocks]:
    """All combinations of the values of these options, and the blocks (other options, seed) that have each of them."""
    blocks: Blocks = defaultdict(dict)
    several: list[dict[str, None]] = [{} for _ in names]
    for result in results:
        if not math.isfinite(result.score):
            continue
        others = frozenset((name, value) for name, value in result.options.items() if name not in names)
        values = tuple(result.options.get(name, "") for name in names)
        blocks[others, result.seed][values] = result.score
        for known, value in zip(several, values, strict=True):
            known[value] = None
    wanted = list(product(*several))
    return wanted, {key: block for key, block in blocks.items() if len(block) == len(wanted)}


def _over_seeds(blocks: Mapping[tuple[Hashable, str], float]) -> Mean:
    """The mean over seeds of the means of the blocks of a seed."""
    seeds = defaultdict(list)
    for (_, seed), value in blocks.items():
        seeds[seed].append(value)
    return mean([_average(values) for values in seeds.values()])


def _average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def digits(value: float | None, half: float | None = None) -> str:
    """A number with as many digits as half of its interval allows: two of the interval's; four without interval."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else str(value)
    if half is None or not math.isfinite(half):
        return f"{value:.4g}"
    if half <= 1e-6 * abs(value):
        return f"{value:.6g}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(half)))}f}"

"""Class accuracy, precision, recall and Fréchet distance against the scale of classifier-free guidance: table and plot.

    python -m src.evaluate -m run=<run> guidance=classifier_free guidance.scale=0,1,1.5,2,3,5 'metrics=[...]' ...
    python -m benchmarks.guidance <run> <run of another seed> ... [--plot docs/images/guidance_digits.png]

Reads the records that src.evaluate wrote to <run>/scores, and takes those with guidance that agree in everything but
the scale. Of several such sets it takes the largest. Each number is the mean over the runs, with the standard
deviation.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from src.evaluation.record import Record
from src.runs.folder import SCORES_FILE

Table = dict[float, dict[str, list[float]]]


def read(runs: list[Path]) -> Table:
    """The scores by scale and name, one value for each run that has been scored at this scale.

    Raises:
        SystemExit: there are no scores with guidance.
    """
    tables: dict[str, Table] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for path in sorted(path for run in runs for path in run.glob(f"scores/*/{SCORES_FILE}")):
        record = Record.read(path)
        recipe = record.protocol.get("recipe", {"guidance": "none"})  # a likelihood has none
        if match := re.match(r"ClassifierFree\(scale=([\d.]+)", recipe["guidance"]):
            recipe["guidance"] = recipe["guidance"].removeprefix(match[0])
            del recipe["network_evaluations"]
            for name, value in record.scores.items():
                key = json.dumps(record.protocol, sort_keys=True)
                tables[key][float(match[1])][name].append(value)
    if not tables:
        raise SystemExit(
            f"{', '.join(map(str, runs))}: no scores with guidance; make them with python -m src.evaluate -m"
            " guidance=classifier_free guidance.scale=1,2,3 ..."
        )
    largest = max(tables.values(), key=lambda table: sum(len(row) for row in table.values()))
    return dict(sorted(largest.items()))


def cell(values: list[float]) -> str:
    """Mean and standard deviation."""
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="runs that differ in their seed")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    table = read(arguments.runs)
    names = list(next(iter(table.values())))
    print(f"| scale | {' | '.join(names)} | runs |")
    print("|" + " --- |" * (len(names) + 2))
    for scale, row in table.items():
        print(
            f"| {scale:g} | {' | '.join(cell(row[name]) for name in names)} | {min(map(len, row.values()))} |"
        )
    if arguments.plot:
        plot(table, arguments.plot)


def plot(table: Table, path: Path) -> None:
    """Shares on the left, the Fréchet distance on the right; a band of one standard deviation around the means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.52), dpi=100)
    for name in next(iter(table.values())):
        axes = right if name.startswith(("fd_", "fid")) else left
        values = [row[name] for row in table.values()]
        means = [mean(each) for each in values]
        spreads = [stdev(each) if len(each) > 1 else 0.0 for each in values]
        (line,) = axes.plot(list(table), means, marker="o", label=name)
        bounds = [[m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1)]
        axes.fill_between(list(table), *bounds, color=line.get_color(), alpha=0.2, linewidth=0)
    right.set_yscale("log")
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    for axes, label in ((left, "share"), (right, "Fréchet distance")):
        axes.set(xlabel="guidance scale (1: none)", ylabel=label)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    left.set_ylim(0, 1.02)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()

"""Scores of one checkpoint for DDIM with several eta and numbers of steps, as in DDIM's table 1, and a plot.

    python -m src.evaluate -m run=<run> sampler.eta=0,0.2,0.5,1 sampler.steps=10,20,50,100 ...
    python -m benchmarks.ddim_table <run> [--plot docs/images/eta.png]

Reads the scores of src.evaluate in <run>/scores: those with DDIM that differ only in eta and steps. Of several such
sets the largest is used.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path


def read(run: Path) -> tuple[str, dict[float, dict[int, float]]]:
    """The score's name, and its values by eta and steps.

    Raises:
        SystemExit: there are no scores with DDIM.
    """
    # by the name of the score and its protocol without eta and steps
    tables: dict[tuple[str, str], dict[tuple[float, int], float]] = defaultdict(dict)
    for path in sorted(run.glob("scores/*/scores.json")):
        record = json.loads(path.read_text())
        recipe = record["protocol"].get("recipe", {"sampler": "none"})  # a likelihood has none
        if eta := re.fullmatch(r"DDIM\(eta=(.*)\)", recipe.pop("sampler")):
            steps = recipe.pop("steps")
            del recipe["network_evaluations"]
            for name, value in record["scores"].items():
                tables[name, json.dumps(record["protocol"], sort_keys=True)][float(eta[1]), steps] = value
    if not tables:
        raise SystemExit(
            f"{run}: no scores with DDIM there; make them with python -m src.evaluate -m run={run} ..."
        )
    (name, protocol), scores = max(tables.items(), key=lambda item: len(item[1]))
    if len(tables) > 1:
        print(f"the largest of {len(tables)} sets: {protocol}", file=sys.stderr)
    table: dict[float, dict[int, float]] = defaultdict(dict)
    for (eta, steps), value in sorted(scores.items()):
        table[eta][steps] = value
    return name, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    name, table = read(arguments.run)
    steps = sorted({S for row in table.values() for S in row})
    print(f"| eta | {' | '.join(f'S = {S}' for S in steps)} |")
    print("|" + " --- |" * (len(steps) + 1))
    for eta, row in table.items():
        print(f"| {eta:g} | {' | '.join(f'{row[S]:.2f}' if S in row else '' for S in steps)} |")
    if arguments.plot:
        plot(name, table, arguments.plot)


def plot(name: str, table: dict[float, dict[int, float]], path: Path) -> None:
    """Plots the score against the steps, one line per eta."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    figure, axes = pyplot.subplots(figsize=(5.5, 3.52), dpi=100)
    for eta, row in table.items():
        axes.plot(list(row), list(row.values()), marker="o", label=f"eta = {eta:g}")
    axes.set(xscale="log", xlabel="steps = network evaluations", ylabel=name)
    axes.set_xticks(sorted({S for row in table.values() for S in row}))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()

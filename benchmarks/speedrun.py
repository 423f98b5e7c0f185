"""The table of a speed-run (`make speedrun`) for docs/results.md: rows by their mean score, the best first.

    python -m benchmarks.speedrun runs/sweeps/<time> [<another sweep> ...]

All sweeps must have the same budget; of a row and seed that was run twice the last sweep counts. Only seeds count
with which every row has ended. Intervals are 95 % (Student's t over the seeds); the difference from the best row is
taken seed by seed.
"""

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from src.report.effects import Mean, Result, marginal_means
from src.runs.files import read_json

OPTION, SCORE = "speedrun", "fd_fashion_mnist"


def results_of(sweep: Path) -> list[tuple[Result, int, float]]:
    """Of each job that has ended: its score, its steps and its budget in seconds."""
    found = []
    for outcome in sorted(sweep.glob("*/outcome.json")):
        content = read_json(outcome, dict[str, Any])
        if SCORE not in content.get("scores", {}):
            continue
        given = dict(override.split("=", 1) for override in content["overrides"] if "=" in override)
        config = OmegaConf.load(outcome.parent / "config.yaml")
        row = given.get(OPTION, "baseline")
        result = Result({OPTION: row}, str(config.seed), content["scores"][SCORE])
        found.append((result, config.trainer.max_steps, config.budget))
    return found


def shown(mean: Mean | None) -> str:
    """A mean and half of its interval."""
    if mean is None:
        return "-"
    return f"{mean.value:.2f}" + ("" if mean.half is None else f" ± {mean.half:.2f}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweeps", type=Path, nargs="+")
    ended = [each for sweep in parser.parse_args().sweeps for each in results_of(sweep)]
    found = {(result.options[OPTION], result.seed): (result, count) for result, count, _ in ended}
    rows = {row for row, _ in found}
    complete = [each for (_, seed), each in found.items() if all((row, seed) in found for row in rows)]
    budgets = sorted({budget for _, _, budget in ended})
    if len(budgets) != 1:
        raise SystemExit(
            "trainings can be ranked for one budget only, and these have"
            f" {', '.join(f'{budget:g} s' for budget in budgets) or 'none: no training has ended'}"
        )
    print(f"{len(found)} trainings, budget {budgets[0]:g} s\n")
    print(
        f"| row | steps | ms a step | {SCORE} | from the best | seeds |\n| --- | --- | --- | --- | --- | --- |"
    )
    for row in marginal_means([result for result, _ in complete]):
        count = fmean(steps for result, steps in complete if result.options[OPTION] == row.value)
        milliseconds = 1000 * budgets[0] / count
        print(
            f"| {row.value} | {count:,.0f} | {milliseconds:.0f} | {shown(row.mean)} | {shown(row.difference)}"
            f" | {row.results} |"
        )


if __name__ == "__main__":
    main()

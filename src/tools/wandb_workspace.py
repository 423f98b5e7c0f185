"""Save a view of curves, scores and samples in wandb: python -m src.wandb_workspace <run folder> --entity NAME

The panels are those of the curves that the run has written; the view shows all runs of its wandb project. Needs an API
key and the extra `workspace` (pip install -e ".[workspace]"). Each start makes a new view.
"""

import argparse
import csv
from pathlib import Path
from typing import TYPE_CHECKING

from src.errors import UserError
from src.report.run import curve_files, flat, is_run, read_yaml
from src.runs.folder import CONFIG_FILE

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

BY_NOISE_LEVEL = "train/loss_q"
"""Prefix of the losses of the quarters of the times."""


def curves_of(folder: Path) -> list[str]:
    """Names of the curves of a run, sorted.

    Raises:
        UserError: it is no run folder, or has no curves.
    """
    if not is_run(folder):
        raise UserError(f"{folder}: no run folder; give the folder of a training")
    names: set[str] = set()
    for path in curve_files(folder):
        with path.open(newline="") as file:
            names |= {*next(csv.reader(file), [])}
    names -= {"step", "epoch"}
    if not names:
        raise UserError(f"{folder}: has no curves yet; give a run that has logged some")
    return sorted(names)


def workspace_of(curves: list[str], entity: str, project: str) -> "Workspace":
    """The view: scores, samples, losses (by noise level in one panel) and the rest of the training's curves.

    Args:
        curves: their names; those without a prefix are scores.
        entity: user or team in wandb.
        project: in wandb.
    """
    import wandb_workspaces.reports.v2 as panels
    from wandb_workspaces.workspaces import Section, Workspace

    scores = [name for name in curves if "/" not in name]
    quarters = [name for name in curves if name.startswith(BY_NOISE_LEVEL)]
    losses = [name for name in curves if name.startswith(("train/loss", "val/")) and name not in quarters]
    rest = [name for name in curves if name not in {*scores, *quarters, *losses}]
    by_level = panels.LinePlot(title="training loss by quarters of the times", y=quarters, log_y=True)
    sections = {
        "scores": [panels.LinePlot(y=[name]) for name in scores],
        "samples": [panels.MediaBrowser(media_keys=["samples"], gallery_axis="step")],
        "loss": [
            *(panels.LinePlot(y=[name], log_y=True) for name in losses),
            *([by_level] if quarters else []),
        ],
        "training": [panels.LinePlot(y=[name]) for name in rest],
    }
    shown = [Section(name=name, panels=inside, is_open=True) for name, inside in sections.items() if inside]
    return Workspace(entity=entity, project=project, name="Diffusion", sections=shown)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m src.wandb_workspace", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, which has the curves")
    parser.add_argument("--entity", required=True, help="user or team in wandb")
    parser.add_argument("--project", help="in wandb; default: the run's")
    arguments = parser.parse_args()
    try:
        curves = curves_of(arguments.run)
        project = flat(read_yaml(arguments.run / CONFIG_FILE)).get("logger.wandb.project")
    except UserError as error:
        parser.error(str(error))
    except (OSError, ValueError, csv.Error) as error:
        parser.error(f"{arguments.run}: its configuration or its curves cannot be read ({error})")
    project = arguments.project or project
    if not project:
        parser.error(f"--project: {arguments.run} was not logged to wandb; give the name of a project")
    try:
        workspace = workspace_of(curves, arguments.entity, project)
    except ImportError as error:
        parser.error(f'{error}; pip install -e ".[workspace]"')
    try:
        workspace.save()  # prints the address
    except Exception as error:  # the package has no class for a missing key, permission or network
        first = str(error).strip().partition("\n")[0]
        parser.error(f"wandb did not take the view: {first}; see wandb login")


if __name__ == "__main__":
    main()

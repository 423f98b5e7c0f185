"""What the entry points share: composing with Hydra, one-line errors, `--help`, the exit status.

Nothing heavy is imported here: `--help` and a mistyped option answer at once.
"""

import json
import logging
import os
import sys

from src.app.options import CONF, HELP, IMPORT, OPTIONS, groups_of
from src.errors import UserError
from src.runs.output import forgiving_output
from src.runs.stopping import LAUNCHER, ExitOnSignal, die_with

JOB_FAILED = 1
USER_ERROR = 2
MULTIRUN = ("-m", "--multirun")


def run(entry_point: str) -> None:
    """Composes conf/<entry point>.yaml with the command line's overrides and runs the job on it.

    Exits with status 0, or 2 after a mistake of the user's, reported in one line. In a sweep each job's outcome is
    written to its folder, a failing job does not stop the others, and a table closes the sweep; the status is then 1 if
    a job has failed. A signal ends the process with 128 + signal, unless the job handles it (`ExitOnSignal`); lost
    output is no error.

    Args:
        entry_point: "train", "sample", "evaluate", "export", "plan" or "import_weights".
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8
    # first, wherever they were typed: Hydra's parser takes flags only before all overrides or after them
    arguments = sorted(sys.argv[1:], key=lambda argument: argument not in MULTIRUN)
    if any(argument in ("--help", "-h") for argument in arguments):
        with forgiving_output():
            print(help_text(entry_point))
        return
    # With it, Hydra leaves exceptions to us instead of printing its own lines and exiting with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if LAUNCHER in os.environ and int(os.environ.get("LOCAL_RANK", "0")) > 0:
        die_with(int(os.environ[LAUNCHER]))
    with ExitOnSignal().installed(), forgiving_output():
        try:
            failed = _run(entry_point, arguments)
        except UserError as error:
            sys.exit(_complain(str(error)))
    if failed:
        sys.exit(JOB_FAILED)


def _run(entry_point: str, arguments: list[str]) -> int:
    """Runs one job, or those of a sweep; returns how many of them have failed."""
    if entry_point in ("runs", "report"):
        from src.report import command

        return command.main(entry_point, arguments)
    from src.app.jobs import explained, register, run_single

    sweep = [argument for argument in arguments if argument not in MULTIRUN]
    if entry_point == "plan":
        from src.app.plan import plan

        register()
        with explained("train", ["-m", *sweep]):
            return plan(sweep)
    if entry_point == "import_weights":
        from src.app.import_weights import import_weights

        register()
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        with explained("train", arguments):
            import_weights(arguments)
        return 0
    if entry_point == "explain":
        from src.app.explain import explain_scores

        register()
        with explained("evaluate", sweep):
            return explain_scores(sweep)
    if entry_point == "search":
        from src.app.search import search

        register()
        with explained("evaluate", ["-m", *sweep]):
            return search(sweep)
    if entry_point == "export" and len(sweep) < len(arguments):
        raise UserError("src.export writes one run: leave -m out")
    if len(sweep) < len(arguments):
        from src.app.sweep.run import run_sweep

        register()
        with explained(entry_point, arguments):
            return run_sweep(entry_point, sweep)
    run_single(entry_point, arguments)
    return 0


def _complain(line: str) -> int:
    from src.app.environment import redacted

    print(f"error: {redacted(line)}", file=sys.stderr)
    return USER_ERROR


def help_text(entry_point: str) -> str:
    """The entry point's groups, choices and options, from the comments in conf/ and the table of options."""
    if entry_point == "plan":
        return (
            "What a training would cost on this machine: parameters, operations, time, memory, disk.\n"
            "    python -m src.plan schedule=cosine model=unet_small\n"
            "    python -m src.plan model=unet_tiny,unet_small seed=0,1,2\n"
            "The options are those of src.train, see python -m src.train --help."
        )
    if entry_point in ("runs", "report"):
        from src.report import command

        return command.HELP[entry_point]
    if entry_point == "import_weights":
        return "\n".join(
            [
                "A run from weights of diffusers, DDIM, improved and guided diffusion, EDM or DiT (docs/interop.md).",
                "    python -m src.import_weights source=ddpm-cifar10-32 out=runs/ddpm data=cifar10",
                *(f"    {f'{option.name}={option.default}':<28}  {option.help}" for option in IMPORT),
                "Further options are those of src.train, see python -m src.train --help; data=... must be given.",
            ]
        )
    if entry_point in HELP:
        return HELP[entry_point]
    lines = (CONF / f"{entry_point}.yaml").read_text(encoding="utf-8").splitlines()
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(line.lstrip("# "))
    text = [*head, ""]
    for group, (chosen, comment) in groups_of(entry_point).items():
        text.append(f"{group}={chosen}   {comment}")
        for path in sorted((CONF / group).glob("*.yaml")):
            content = path.read_text(encoding="utf-8").splitlines()
            first = next(
                line.lstrip("# ") for line in content if line.startswith("#") and "@package" not in line
            )
            text.append(f"    {path.stem:<26} {first}")
    text += ["", "Single options, with their defaults:"]
    for option in OPTIONS[entry_point]:
        default = option.default if isinstance(option.default, str) else json.dumps(option.default)
        text.append(f"    {f'{option.name}={default}':<32}  {option.help}")
    text += [
        "",
        "Choose with group=choice, set numbers with group.option=value, sweep with -m and commas:",
        f"    python -m src.{entry_point} --cfg job              shows the composed configuration",
        f"    python -m src.{entry_point} --hydra-help           shows Hydra's own flags",
    ]
    return "\n".join(text)

"""What the entry points share: composing with Hydra, one-line errors, `--help`, the exit status.

Nothing heavy is imported here: `--help` and a mistyped option answer at once.
"""

import json
import os
import signal
import sys
from typing import Any

from src.app.options import CONF, OPTIONS, groups_of
from src.errors import UserError

JOB_FAILED = 1
USER_ERROR = 2


def run(entry_point: str) -> None:
    """Composes conf/<entry point>.yaml with the command line's overrides and runs the job on it.

    Exits with status 0, or 2 after a mistake of the user's, reported in one line. In a sweep each job's outcome is
    written to its folder, a failing job does not stop the others, and a table closes the sweep; the status is then 1 if
    a job has failed. Ctrl-C exits with 130 silently, unless the job handles it.

    Args:
        entry_point: "train", "sample" or "evaluate".
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8
    # first, wherever they were typed: Hydra's parser takes flags only before all overrides or after them
    arguments = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    if any(argument in ("--help", "-h") for argument in arguments):
        _write(help_text(entry_point) + "\n")
        return
    # With it, Hydra leaves exceptions to us instead of printing its own lines and exiting with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:
        # not KeyboardInterrupt: Lightning takes that for a failure, and its status would be 1
        signal.signal(signal.SIGINT, _exit_on_signal)
    try:
        from src.app.jobs import run_hydra
        from src.app.messages import explain
        from src.app.overrides import prepare

        name = entry_point
        try:
            name, sys.argv[1:] = prepare(entry_point, arguments)
            failed = run_hydra(name)
        except UserError as error:
            sys.exit(_complain(str(error)))
        except Exception as error:
            line = explain(error, entry_point, sys.argv[1:], name)
            if line is None:
                raise
            sys.exit(_complain(line))
    finally:
        signal.signal(signal.SIGINT, interrupt)
    _write("")
    if failed:
        sys.exit(JOB_FAILED)


def _write(text: str) -> None:
    """Prints, and flushes what was printed before; a lost output (a closed pipe, a full disk) is no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError:
        from src.runs.machine import discard_output

        discard_output(sys.stdout)


def _exit_on_signal(signum: int, frame: Any) -> None:
    sys.exit(128 + signum)


def _complain(line: str) -> int:
    from src.app.environment import redacted

    print(f"error: {redacted(line)}", file=sys.stderr)
    return USER_ERROR


def help_text(entry_point: str) -> str:
    """The entry point's groups, choices and options, from the comments in conf/ and the table of options."""
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

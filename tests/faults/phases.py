"""Signals in every phase of a command, lost output at any moment, errors in a training, and precisions."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from src.runs.folder import find_run
from tests.faults import processes
from tests.faults.processes import DDP, STEPS, TINY, Fault, Replacement, run, run_folder, start_command
from tests.faults.states import differences, training_state

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
STEP = "src.training.module:DiffusionModule.training_step"
# phase -> the function, the number of its call, and the step that must have been saved
PHASES = {
    "start": ("src.app.assemble:denoiser_of", 1, None),
    "data": ("src.data.digits:Digits._load", 1, None),
    "a step": (STEP, 5, 5),
    "validation": ("src.training.module:DiffusionModule.validation_step", 3, 5),
    "a preview": ("src.generation.recipe:Recipe.start", 1, 4),
    "a score": ("src.evaluation.scores:ScoreSet.update", 1, 6),
    "a save": ("src.training.checkpoint:_Hashing.write", 100, 3),
    "the end": ("src.app.train:closing_summary", 1, 12),
}
OF_RUNS = {
    "sampling": ("sample", "src.generation.recipe:Recipe.start", 2),
    "evaluation": ("evaluate", "src.evaluation.scores:ScoreSet.update", 2),
}
# In rank 0, right after it has started the other processes, which then import for seconds.
LAUNCHED = "src.training.distributed:_observe"
SECONDS = 30
# With two processes: phase, signal, and the rank that receives it. Only rank 0 starts others, previews and saves.
TWO_PROCESSES = (
    ("launch", signal.SIGTERM, 0),
    ("launch", signal.SIGHUP, 0),
    ("launch", signal.SIGINT, "group"),
    ("launch", signal.SIGKILL, 0),
    ("start", signal.SIGUSR1, 0),
    ("data", signal.SIGUSR1, 1),
    ("data", signal.SIGINT, "group"),
    ("a step", signal.SIGTERM, 0),
    ("a step", signal.SIGTERM, 1),
    ("a step", signal.SIGTERM, "group"),
    ("a step", signal.SIGHUP, 1),
    ("a step", signal.SIGINT, "group"),
    ("a step", signal.SIGUSR1, 0),
    ("a step", signal.SIGUSR1, "group"),
    ("validation", signal.SIGTERM, 1),
    ("validation", signal.SIGINT, "group"),
    ("a preview", signal.SIGTERM, 0),
    ("a preview", signal.SIGINT, "group"),
    ("a score", signal.SIGHUP, 1),
    ("a score", signal.SIGTERM, "group"),
    ("a save", signal.SIGUSR1, 0),
    ("a save", signal.SIGINT, "group"),
    ("the end", signal.SIGTERM, 0),
    ("sampling", signal.SIGINT, "group"),
    ("sampling", signal.SIGHUP, 0),
    ("evaluation", signal.SIGTERM, 0),
    ("evaluation", signal.SIGINT, "group"),
)


@dataclass(frozen=True)
class Case:
    """A signal in a phase.

    Attributes:
        phase: a name in PHASES or OF_RUNS, or "launch".
        signum: the signal.
        who: the rank of two processes that receives it, "group" for all; None for a command of one process.
        again: how many times it is sent.
    """

    phase: str
    signum: int
    who: int | str | None = None
    again: int = 1

    @property
    def name(self) -> str:
        to = {None: "", "group": " to both"}.get(self.who, f" to rank {self.who}")
        return f"{f'{self.again} ' if self.again > 1 else ''}{signal.Signals(self.signum).name} in {self.phase}{to}"


def cases() -> Iterator[Case]:
    """All signals and phases with one process, and a selection with two."""
    for phase in (*PHASES, *OF_RUNS):
        for signum in SIGNALS:
            yield Case(phase, signum)
    yield Case("a step", signal.SIGTERM, again=2)
    for phase, signum, who in TWO_PROCESSES:
        yield Case(phase, signum, who)


def slurm(folder: Path) -> dict[str, str]:
    """The environment of a SLURM job whose `scontrol` writes to folder/requeued."""
    binary = folder / "bin" / "scontrol"
    binary.parent.mkdir(parents=True, exist_ok=True)
    binary.write_text(f'#!/bin/sh\necho "$@" >> {folder}/requeued\n')
    binary.chmod(0o755)
    return {"SLURM_JOB_ID": "4711", "PATH": f"{binary.parent}:{os.environ['PATH']}"}


def problem_of(folder: Path, case: Case, trained: Path, expected: dict | None = None) -> str | None:
    """Runs a case; returns what was not as required.

    Args:
        folder: where the command runs.
        case: the case.
        trained: a finished run, for sampling and evaluation.
        expected: the final state of this training without a signal; None if the training is not continued.
    """
    if case.who is not None:
        return _of_two_processes(folder, case, trained, expected)
    environment = slurm(folder) if case.signum == signal.SIGUSR1 else {}
    if case.phase in OF_RUNS:
        name, place, call = OF_RUNS[case.phase]
        step, arguments = None, [name, f"run={trained}", "n=12", "batch_size=2", "sampler.steps=3"]
    else:
        place, call, step = PHASES[case.phase]
        arguments = ["train", *TINY]
    done = run(folder, *arguments, faults=[Fault(place, call, case.signum, again=case.again)], **environment)
    if environment and not (folder / "requeued").exists():
        return "not requeued"
    wrong = _wrong(case, done.status, 0, done.process.pid, done.output, folder, step)
    if wrong or expected is None or case.phase in OF_RUNS or step == STEPS:
        return wrong
    if environment:  # SLURM starts the same command line again, wherever the signal came
        again = run(folder, "train", *TINY, SLURM_RESTART_COUNT="1", **environment)
    elif step is None:
        return None
    else:
        again = run(folder, "train", "ckpt=last")
    return _not_continued(again, folder, expected)


def _not_continued(done: processes.Command, folder: Path, expected: dict) -> str | None:
    if done.status:
        return f"not continued: {done.output[-500:]}"
    wrong = differences(expected, training_state(run_folder(folder), STEPS))
    return f"{len(wrong)} leaves differ after it was continued" if wrong else None


def _of_two_processes(folder: Path, case: Case, trained: Path, expected: dict | None) -> str | None:
    step, faults, began = None, [], time.monotonic()
    if case.phase in OF_RUNS:
        arguments = [OF_RUNS[case.phase][0], f"run={trained}", "n=4000", "batch_size=2", "sampler.steps=20"]
        arguments += ["devices=2", "device=cpu", f"hydra.run.dir={folder}"]
        arguments += [f"out={folder}/out"] if case.phase == "sampling" else []
    else:
        arguments = ["train", *DDP]
        place, call, step = (LAUNCHED, 1, None) if case.phase == "launch" else PHASES[case.phase]
        rank = 0 if case.who == "group" else case.who
        faults = [Fault(place, call, case.signum, rank=rank, group=case.who == "group")]
    if case.signum == signal.SIGKILL:  # below: the import of faults would delay the other rank's first line
        faults = []
    leader = start_command(folder, *arguments, faults=faults)
    try:
        if not faults:
            if case.phase in OF_RUNS:
                begun = "out/images/*.png" if case.phase == "sampling" else "cache/**/*.*"
                processes.wait_for(lambda: list(folder.glob(begun)), 300)
                time.sleep(1)  # the statistics of the reference set are written just before the first images
            else:
                processes.wait_for(lambda: len(processes.ranks(leader)) >= 2, 300)
            began = time.monotonic()
            (os.killpg if case.who == "group" else os.kill)(leader.pid, case.signum)
        status = leader.wait(600)
        status = 128 - status if status < 0 else status
        waited = 0 if faults else time.monotonic() - began
        output = (folder / "output.txt").read_text()
        processes.check_reached(folder)
        wrong = _wrong(case, status, waited, leader.pid, output, folder, step)
    finally:
        processes.leave_nothing(leader)
    if wrong or expected is None or step in (None, STEPS):
        return wrong
    leader = start_command(folder, "ckpt=last")
    try:
        if leader.wait(600):
            return f"not continued: {(folder / 'output.txt').read_text()[-500:]}"
    finally:
        processes.leave_nothing(leader)
    differing = differences(expected, training_state(run_folder(folder), STEPS))
    return f"{len(differing)} leaves differ after it was continued" if differing else None


def _wrong(
    case: Case, status: int, waited: float, session: int, output: str, folder: Path, step: int | None
) -> str | None:
    if status != 128 + case.signum:
        return f"exit status {status}\n{output[-500:]}"
    if waited > SECONDS:
        return f"it took {waited:.0f} s to end"
    try:
        processes.wait_for(lambda: not processes.members(session), SECONDS)
    except TimeoutError:
        return "a process is left"
    if "Traceback" in output:
        return f"a traceback\n{output[-500:]}"
    if step is not None:
        saved = find_run(run_folder(folder)).checkpoint.stem
        if saved != f"step_{step:08d}":
            return f"the newest checkpoint is {saved}, not of step {step}"
    return None


# name -> the function and the number of its call before which output is lost
MOMENTS = {
    "at the start": ("src.app.assemble:denoiser_of", 1),
    "in a step": (STEP, 5),
    "in validation": ("src.training.module:DiffusionModule.validation_step", 3),
    "in a preview": ("src.generation.recipe:Recipe.start", 1),
    "in a score": ("src.evaluation.scores:ScoreSet.update", 1),
}


def lose(kind: str, streams: tuple[int, ...], original, call, *arguments, **named):
    """A replacement that makes standard streams unwritable."""
    for stream in streams:
        if kind == "closed pipe":
            reader, writer = os.pipe()
            os.close(reader)
        else:
            writer = os.open("/dev/full", os.O_WRONLY)
        os.dup2(writer, stream)
    return original(*arguments, **named)


def lost_outputs() -> Iterator[tuple[str, Replacement]]:
    """Kinds of lost output at each moment."""
    for kind in ("closed pipe", "full disk"):
        for streams in ((1,), (1, 2)):
            for moment, (place, call) in MOMENTS.items():
                which = "standard output and error" if len(streams) > 1 else "standard output"
                yield (
                    f"{which}, {kind}, {moment}",
                    Replacement(place, partial(lose, kind, streams), call=call),
                )


def problem_without_output(folder: Path, fault: Replacement, expected: dict) -> str | None:
    """Trains with a lost output; returns how the result differs from the expected state."""
    done = run(folder, "train", *TINY, faults=[fault])
    return _not_continued(done, folder, expected)


def fail(*_, **named):
    """A replacement that raises."""
    raise RuntimeError("injected")


# name -> the function, the number of its call, and the step that must be saved; None: the training continues
ERRORS = {
    "a step": (STEP, 5, 4),
    "the backward pass": ("torch:Tensor.backward", 8, 7),
    "the optimiser": ("torch.optim.adam:adam", 8, 6),  # not saved in the middle of an update
    "validation": ("src.training.module:DiffusionModule.validation_step", 3, 5),
    "reading data": ("src.data.datamodule:_already_a_batch", 6, 4),
    "the curves": ("src.training.callbacks.curves:TrainingCurves.act", 2, 4),
    "a preview": ("src.generation.recipe:Recipe.start", 1, None),
    "a score": ("src.evaluation.scores:ScoreSet.update", 1, None),
    "a logger": ("lightning.pytorch.loggers:CSVLogger.save", 2, None),
}


def problem_after_error(folder: Path, name: str, expected: dict) -> str | None:
    """Trains with an injected error, continues without it, and compares with the expected state."""
    place, call, step = ERRORS[name]
    done = run(folder, "train", *TINY, faults=[Replacement(place, fail, call=call)])
    if done.status != (0 if step is None else 1):
        return f"exit status {done.status}\n{done.output[-500:]}"
    if step is not None:
        saved = find_run(run_folder(folder)).checkpoint.stem
        if saved != f"step_{step:08d}":
            return f"the newest checkpoint is {saved}, not of step {step}"
        done = run(folder, "train", "ckpt=last")
        if done.status:
            return f"not continued: {done.output[-500:]}"
    elif "training continues" not in done.output or "failed " not in done.output:
        return "not reported"
    wrong = differences(expected, training_state(run_folder(folder), STEPS))
    return f"{len(wrong)} leaves differ" if wrong else None


PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")
REFUSED_PRECISIONS = ("16-true", "16-mixed", "transformer-engine", "transformer-engine-float16")


def problem_of_precision(folder: Path, precision: str) -> str | None:
    """Trains with previews and scores, stops by a signal, continues bit-exactly, samples and evaluates."""
    overrides = (*TINY, f"trainer.precision={precision}")
    if precision in REFUSED_PRECISIONS:
        done = run(folder, "train", *overrides)
        refused = done.status == 2 and f"trainer.precision={precision}" in done.output.splitlines()[-1]
        return None if refused else f"not refused: {done.output[-300:]}"
    whole = run(folder / "whole", "train", *overrides)
    stopped = run(folder / "parts", "train", *overrides, faults=[Fault(STEP, 5, signal.SIGTERM)])
    if (whole.status, stopped.status) != (0, 143):
        return f"exit status {whole.status}, {stopped.status}: {whole.output[-300:]} {stopped.output[-300:]}"
    done = run(folder / "parts", "train", "ckpt=last")
    one, other = (training_state(run_folder(folder / each), STEPS) for each in ("whole", "parts"))
    if done.status or differences(one, other):
        return f"not as uninterrupted: {done.output[-300:]}"
    averages = [value for leaf, value in one.items() if leaf.startswith("/ema/weights")]
    wanted = "torch.float64" if precision == "64-true" else "torch.float32"
    if {str(average.dtype) for average in averages} != {wanted}:
        return "averages of a lower precision"
    for command in ("sample", "evaluate"):
        trained = run_folder(folder / "whole")
        done = run(folder, command, f"run={trained}", "n=16", "batch_size=8", "sampler.steps=3")
        if done.status:
            return f"{command}: {done.output[-300:]}"
    return None

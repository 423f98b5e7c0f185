"""Injects all faults many times and prints a table of the results: python -m tests.faults --help."""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.faults import hostile, phases, processes
from tests.faults.phases import STEP
from tests.faults.processes import DDP, ROOT, STEPS, TINY, Command, Fault, resume, run, run_folder, train
from tests.faults.saving import kill_while_saving
from tests.faults.states import differences, flat, training_state

FEATURES = (
    *("workers=2", "max_device_batch=8", "trainer.precision=bf16-mixed", "ema=power", "ema.snapshot_every=3"),
    *("variance=learned_range", "loss=hybrid", "time_sampling=importance", "conditioning=class"),
)
VARIANTS = {
    "no workers": (),
    "2 workers": ("workers=2",),
    "accumulation of 2": ("max_device_batch=8",),
    "many features": FEATURES,
    "compiled": ("compile=true",),
}
# place of a kill -> the function and a lower bound on its number of calls
KILLED = {
    "a step": (STEP, STEPS),
    "validation": ("src.training.module:DiffusionModule.validation_step", 20),
    "a preview or score": ("src.generation.recipe:Recipe.start", 5),
    "a save": ("src.training.checkpoint:_Hashing.write", 4000),
}


class Table:
    """Counts per fault: how many were injected, how many ended as required, and the problems of the others."""

    def __init__(self, rows: dict[str, dict]) -> None:
        self.rows = rows

    def attempt(self, name: str, what: str, problem: Callable[..., str | None], *arguments: Any) -> None:
        """Counts the result of a function; an exception of it is a problem, too."""
        try:
            found = problem(*arguments)
        except (AssertionError, TimeoutError, subprocess.TimeoutExpired) as error:
            found = f"{type(error).__name__}: {str(error)[-500:]}"
        self.count(name, found and f"{what}: {found}")

    def count(self, name: str, problem: str | None) -> None:
        row = self.rows.setdefault(name, {"injected": 0, "as required": 0, "problems": []})
        row["injected"] += 1
        row["as required"] += problem is None
        row["problems"] += [problem] if problem else []
        print(
            f"{time.strftime('%H:%M:%S')}  {name}: {row['as required']}/{row['injected']}  {problem or ''}",
            flush=True,
        )

    def markdown(self) -> str:
        lines = ["| fault | injected | as required |", "|---|---|---|"]
        lines += [f"| {name} | {row['injected']} | {row['as required']} |" for name, row in self.rows.items()]
        return "\n".join(lines)


def non_finite(folder: Path) -> list[str]:
    """Names of the checkpoints below a folder whose weights are not all finite."""
    found = []
    for path in folder.glob("**/*.ckpt"):
        weights = flat(torch.load(path, weights_only=True)["state_dict"]).values()
        found += [path.name] if any(not weight.isfinite().all() for weight in weights) else []
    return found


def ended(place: Path) -> bool:
    """Whether the last checkpoint exists; a training killed after it is compared without resuming."""
    return bool(list(place.glob(f"runs/*/checkpoints/step_{STEPS:08d}.ckpt.json")))


@dataclass
class Faults:
    """What the sections share.

    Attributes:
        folder: for all files.
        options: of the command line.
        table: the counts.
        chance: source of the random instants.
    """

    folder: Path
    options: argparse.Namespace
    table: Table
    chance: random.Random
    _trained: dict[str, tuple[Path, float]] = field(default_factory=dict)

    def trained(self, variant: str) -> tuple[Path, float]:
        """The folder of an uninterrupted training and how many seconds it took, made at the first call."""
        if variant not in self._trained:
            began = time.monotonic()
            command = train(self.folder / "baseline" / variant.replace(" ", "_"), *VARIANTS[variant])
            assert command.status == 0, command.output
            self._trained[variant] = (run_folder(command.folder), time.monotonic() - began)
        return self._trained[variant]

    def trained_by_two(self) -> dict[str, Any]:
        """The final state of an uninterrupted training of two processes."""
        folder = self.folder / "baseline" / "two_processes"
        if not folder.exists():
            leader = processes.start_command(folder, *DDP)
            assert leader.wait(300) == 0, (folder / "output.txt").read_text()
        return training_state(run_folder(folder), STEPS)


def kills(faults: Faults) -> None:
    """Kills trainings at a given place, then at up to two random instants, then finishes and compares them."""
    done = 0
    pairs = list(itertools.product(VARIANTS, KILLED.items()))
    for i, (variant, (where, (function, calls))) in enumerate(itertools.cycle(pairs)):
        if done >= faults.options.kills:
            break
        if variant == "compiled" and i >= 20:  # each start compiles
            continue
        trained, seconds = faults.trained(variant)
        place = faults.folder / f"kills_{i}"
        aimed = Fault(function, faults.chance.randint(1, calls))
        row = f"SIGKILL of a training in {where}, {variant}"
        try:
            struck, problem = killed_and_finished(faults, place, variant, aimed, seconds)
        except (AssertionError, TimeoutError) as error:
            struck, problem = 0, f"{type(error).__name__}: {str(error)[-300:]}"
        else:
            wrong = problem or differences(
                training_state(trained, STEPS), training_state(run_folder(place), STEPS)
            )
            problem = wrong if isinstance(wrong, str) else f"{len(wrong)} leaves differ" if wrong else None
        faults.table.count(row, problem)
        for _ in range(struck):
            faults.table.count(f"SIGKILL of a training at a random instant, {variant}", problem)
        row = "trainings without a number that is not finite in any kept checkpoint"
        faults.table.count(row, str(bad) if (bad := non_finite(place)) else None)
        done += 1 + struck
        shutil.rmtree(place)


def killed_and_finished(
    faults: Faults, place: Path, variant: str, aimed: Fault, seconds: float
) -> tuple[int, str | None]:
    """Trains with a fault, kills the continued training up to twice, and finishes it.

    Returns:
        How often it was killed at a random instant, and the end of the output if the last command has failed.
    """
    overrides = VARIANTS[variant]
    assert train(place, *overrides, faults=[aimed]).status == 128 + signal.SIGKILL
    struck = 0
    while not ended(place) and struck < 2:
        started = list(place.glob("runs/*/checkpoints/step_*.ckpt"))
        arguments = ["ckpt=last"] if started else [*TINY, *overrides]
        command = Command(place, ["train", *arguments]).start()
        command.process.join(faults.chance.uniform(0.1, 0.7) * seconds)
        if command.process.exitcode is not None:
            return struck, command.output[-300:] if command.wait() else None
        command.kill()
        struck += 1
    if ended(place):
        return struck, None
    last = resume(place, *overrides)
    return struck, last.output[-300:] if last.status else None


def sampling_kills(faults: Faults) -> None:
    """Kills and finishes sampling runs, and compares the images with those of an uninterrupted run."""
    folder, chance, table = faults.folder, faults.chance, faults.table
    trained, _ = faults.trained("no workers")
    base = ("sample", f"run={trained}", "n=48", "batch_size=4", "sampler=ddpm", "sampler.steps=10")
    whole = folder / "drawn"
    began = time.monotonic()
    assert run(whole, *base, f"out={whole}/out").status == 0
    seconds = time.monotonic() - began
    done = 0
    while done < faults.options.drawings:
        place = folder / f"draw_{done}"
        command = Command(place, [*base, f"out={place}/out"]).start()
        command.process.join(chance.uniform(0.3, 0.95) * seconds)
        alive = command.process.exitcode is None
        command.kill()
        finished = run(place, *base, f"out={place}/out").status == 0
        same = finished and all(
            path.read_bytes() == (place / "out" / "images" / path.name).read_bytes()
            for path in (whole / "out" / "images").iterdir()
        )
        if alive:
            done += 1
            table.count("SIGKILL of a sampling job at a random instant", None if same else "the bytes differ")
        shutil.rmtree(place)


def ddp_kills(faults: Faults) -> None:
    """Sends SIGKILL to one of two ranks."""
    folder, chance, table = faults.folder, faults.chance, faults.table
    expected = faults.trained_by_two() if faults.options.ddp else {}
    done = 0
    for i in itertools.count():
        if done == faults.options.ddp:
            break
        place = folder / f"ddp_{i}"
        leader = processes.start_command(place, *DDP)
        problem, alive = None, False
        try:
            processes.wait_for(lambda place=place: list(place.glob("runs/*/checkpoints/step_*.ckpt")), 300)
            time.sleep(chance.uniform(0, 2))
            alive = leader.poll() is None
            if alive:
                pids = processes.ranks(leader)
                os.kill(pids[i % len(pids)], signal.SIGKILL)
            leader.wait(60)
        except subprocess.TimeoutExpired:
            problem = "the other rank hangs"
        finally:
            processes.leave_nothing(leader)
        if (
            problem is None
            and not ended(place)
            and processes.start_command(place, "ckpt=last").wait(300) != 0
        ):
            problem = (place / "output.txt").read_text()[-300:]
        elif problem is None and (wrong := differences(expected, training_state(run_folder(place), STEPS))):
            problem = f"{len(wrong)} leaves differ"
        if alive:  # the training had not ended before the kill
            done += 1
            table.count("SIGKILL of one of two processes (gloo)", problem)
        shutil.rmtree(place)


def save_kills(faults: Faults) -> None:
    """Sends SIGKILL during saves, half of them with TMPDIR on another filesystem."""
    folder, chance, table = faults.folder, faults.chance, faults.table
    elsewhere = "/dev/shm" if Path("/dev/shm").is_dir() else str(folder)
    for i in range(faults.options.saves):
        temporary = elsewhere if i % 2 else str(folder)
        wrong = kill_while_saving(folder / f"save_{i}", chance, 20, temporary)
        where = "TMPDIR on another filesystem" if i % 2 else "TMPDIR on the same filesystem"
        table.count(f"SIGKILL during a save, {where}", "; ".join(wrong) or None)
        shutil.rmtree(folder / f"save_{i}")


def each(faults: Faults, row: str, name: str, problem: Callable[..., str | None], *arguments: Any) -> None:
    """Counts a case that runs in a folder of its own, the first argument of `problem`."""
    place = faults.folder / "case"
    faults.table.attempt(row, name, problem, place, *arguments)
    shutil.rmtree(place, ignore_errors=True)


def signals(faults: Faults) -> None:
    """Signals in every phase to one process; stopped trainings are continued."""
    trained, _ = faults.trained("no workers")
    expected = training_state(trained, STEPS)
    for case in phases.cases():
        if case.who is None:
            each(faults, "signals to one process", case.name, phases.problem_of, case, trained, expected)


def signals_to_two(faults: Faults) -> None:
    """Signals in every phase to two processes; stopped trainings are continued."""
    trained, _ = faults.trained("no workers")
    for case in phases.cases():
        if case.who is not None:
            row, expected = "signals to two processes (gloo)", faults.trained_by_two()
            each(faults, row, case.name, phases.problem_of, case, trained, expected)


def outputs_and_errors(faults: Faults) -> None:
    """Lost output at any moment, and errors in a training."""
    expected = training_state(faults.trained("no workers")[0], STEPS)
    for name, fault in phases.lost_outputs():
        each(faults, "output lost during a training", name, phases.problem_without_output, fault, expected)
    for name in phases.ERRORS:
        each(faults, "an error in a training", name, phases.problem_after_error, name, expected)


def precisions(faults: Faults) -> None:
    """All precisions, end to end or refused."""
    for name in (*phases.PRECISIONS, *phases.REFUSED_PRECISIONS):
        row = "precisions refused" if name in phases.REFUSED_PRECISIONS else "precisions, end to end"
        each(faults, row, name, phases.problem_of_precision, name)


def hostile_folders(faults: Faults) -> None:
    """Continues or samples hostile and damaged run folders; see `tests.faults.hostile`."""
    good = hostile.good_run(faults.folder / "good")
    for case in list(hostile.cases(faults.options.seed))[:: faults.options.every]:
        row = f"hostile or damaged folders: {case.kind}"
        each(faults, row, case.name, lambda place, case=case: hostile.problem(case, good, place))


# rows of the table that count tests
TESTED = {
    "tests of malformed image files": "tests/data/test_image_folder.py",
    "bad configurations": "tests/cli/test_bad_input.py::test_train_refuses_in_one_line",
    "hostile targets and checkpoint entries": "tests/faults/test_hostile.py",
    "wandb: unreachable, dying server, killed service": "tests/faults/test_dashboard.py",
    "loss or gradient not finite": "tests/faults/test_numbers.py",
    "writing: damaged files, full disk": "tests/faults/test_writing.py",
}


def tested(faults: Faults) -> None:
    """Counts tests."""
    for name, selection in TESTED.items():
        command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=no", selection]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        for line in done.stdout.splitlines():
            outcome, _, test = line.partition(" ")
            if outcome in ("PASSED", "FAILED", "ERROR"):
                faults.table.count(name, None if outcome == "PASSED" else test)


SECTIONS = {
    "hostile": hostile_folders,
    "kills": kills,
    "saves": save_kills,
    "drawings": sampling_kills,
    "signals": signals,
    "two": signals_to_two,
    "outputs": outputs_and_errors,
    "precisions": precisions,
    "ddp": ddp_kills,
    "tests": tested,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"{', '.join(SECTIONS)}; all by default")
    parser.add_argument("--kills", type=int, default=80, help="number of kills of trainings of one process")
    parser.add_argument("--ddp", type=int, default=20, help="number of kills of one of two processes")
    parser.add_argument("--saves", type=int, default=200, help="number of kills during a save")
    parser.add_argument("--drawings", type=int, default=10, help="number of kills of sampling runs")
    parser.add_argument("--every", type=int, default=1, help="every n-th hostile or damaged folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random instants")
    parser.add_argument(
        "--out", type=Path, help="JSON file for the counts; those of other sections in it are kept"
    )
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no such sections: {', '.join(unknown)}")
    before = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    table = Table(before)
    with tempfile.TemporaryDirectory(prefix="faults_") as name:
        faults = Faults(Path(name), options, table, random.Random(options.seed))
        try:
            for section in options.sections or SECTIONS:
                SECTIONS[section](faults)
        finally:
            print(table.markdown())
            if options.out:
                options.out.write_text(json.dumps(table.rows, indent=2))
    sys.exit(any(row["problems"] for row in table.rows.values()))


if __name__ == "__main__":
    main()

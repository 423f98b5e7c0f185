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
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from src.runs.folder import find_run
from tests.faults import hostile, phases, processes
from tests.faults.processes import DDP, ROOT, STEPS, TINY, Command, Fault, resume, run, run_folder, train
from tests.faults.saving import kill_while_saving
from tests.faults.states import differences, training_state

VARIANTS = {
    "no workers": (),
    "2 workers": ("workers=2",),
    "accumulation of 2": ("max_device_batch=8",),
}
STEP = "src.training.module:DiffusionModule.training_step"
PLACES = {
    "a step": (STEP, 5),
    "validation": ("src.training.module:DiffusionModule.validation_step", 3),
    "a preview": ("src.generation.recipe:Recipe.start", 1),
    "a save": ("src.training.checkpoint:_Hashing.write", 200),
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

    def __init__(self) -> None:
        self.rows: dict[str, dict] = {}

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
        weights = torch.load(path, weights_only=True)["state_dict"].values()
        found += [path.name] if any(not weight.isfinite().all() for weight in weights) else []
    return found


def ended(place: Path) -> bool:
    """Whether the last checkpoint exists; a training killed after it is compared without resuming."""
    return bool(list(place.glob(f"runs/*/checkpoints/step_{STEPS:08d}.ckpt.json")))


def kills(folder: Path, chance: random.Random, number: int, table: Table) -> None:
    """Kills trainings at a given place, then at up to two random instants, then finishes and compares them."""
    baselines, seconds = {}, {}
    for variant, overrides in VARIANTS.items():
        began = time.monotonic()
        command = train(folder / "baseline" / variant.replace(" ", "_"), *overrides)
        seconds[variant] = time.monotonic() - began
        assert command.status == 0, command.output
        baselines[variant] = training_state(run_folder(command.folder), STEPS)
    done = 0
    # 3 variants and 4 places: the cycles give all pairs
    for i, variant, (where, (function, calls)) in zip(
        itertools.count(), itertools.cycle(VARIANTS), itertools.cycle(KILLED.items())
    ):
        if done >= number:
            break
        place = folder / f"kills_{i}"
        aimed = train(place, *VARIANTS[variant], faults=[Fault(function, chance.randint(1, calls))])
        struck = [f"in {where}"] if aimed.status == 128 + signal.SIGKILL else []
        last, finished = aimed, not struck
        while not finished and not ended(place) and len(struck) < min(3, number - done):
            started = list(place.glob("runs/*/checkpoints/step_*.ckpt"))
            arguments = ["ckpt=last"] if started else [*TINY, *VARIANTS[variant]]
            last = Command(place, ["train", *arguments]).start()
            last.process.join(chance.uniform(0.1, 0.7) * seconds[variant])
            finished = last.process.exitcode is not None
            if finished:
                last.status = last.wait()
            else:
                last.kill()
                struck.append("at a random instant")
        if not finished and not ended(place):
            last = resume(place, *VARIANTS[variant])
            finished = True
        if finished and last.status != 0:
            problem = last.output[-300:]
        else:
            wrong = differences(baselines[variant], training_state(run_folder(place), STEPS))
            problem = f"{len(wrong)} leaves differ" if wrong else None
        for how in struck:
            table.count(f"SIGKILL of a training {how}, {variant}", problem)
        table.count(
            "trainings without a number that is not finite in any kept checkpoint",
            str(bad) if (bad := non_finite(place)) else None,
        )
        done += len(struck)
        shutil.rmtree(place)


def sampling_kills(folder: Path, chance: random.Random, number: int, table: Table) -> None:
    """Kills and finishes sampling runs, and compares the images with those of an uninterrupted run."""
    trained = run_folder(folder / "baseline" / "no_workers")
    base = ("sample", f"run={trained}", "n=48", "batch_size=4", "sampler=ddpm", "sampler.steps=10")
    whole = folder / "drawn"
    began = time.monotonic()
    assert run(whole, *base, f"out={whole}/out").status == 0
    seconds = time.monotonic() - began
    done = 0
    while done < number:
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
            table.count("SIGKILL of a drawing at a random instant", None if same else "the bytes differ")
        shutil.rmtree(place)


def ddp_kills(folder: Path, chance: random.Random, number: int, table: Table) -> None:
    """Sends SIGKILL to one of two ranks."""
    baseline = folder / "ddp_baseline"
    assert processes.start_command(baseline, *DDP).wait(300) == 0, (baseline / "output.txt").read_text()
    expected = training_state(run_folder(baseline), STEPS)
    done = 0
    for i in itertools.count():
        if done == number:
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


def save_kills(folder: Path, chance: random.Random, number: int, table: Table) -> None:
    """Sends SIGKILL during saves, half of them with TMPDIR on another filesystem."""
    elsewhere = "/dev/shm" if Path("/dev/shm").is_dir() else str(folder)
    for i in range(number):
        temporary = elsewhere if i % 2 else str(folder)
        wrong = kill_while_saving(folder / f"save_{i}", chance, 20, temporary)
        where = "TMPDIR on another filesystem" if i % 2 else "TMPDIR on the same filesystem"
        table.count(f"SIGKILL during a save, {where}", "; ".join(wrong) or None)
        shutil.rmtree(folder / f"save_{i}")


def signal_cases() -> Iterator[tuple[str, Fault]]:
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for name, (place, call) in PLACES.items():
            yield f"{signum.name} in {name}", Fault(place, call, signum)
    yield "two SIGTERM in a step", Fault(STEP, 5, signal.SIGTERM, again=2)
    yield "two SIGINT in a step", Fault(STEP, 5, signal.SIGINT, again=2)


def signals(folder: Path, table: Table, ddp: bool) -> None:
    """Sends signals to one process (14 cases, resumed and compared) and to two processes (6 cases)."""
    expected = training_state(run_folder(folder / "baseline" / "no_workers"), STEPS)
    for i, (name, fault) in enumerate(signal_cases()):
        place = folder / f"signal_{i}"
        stopped = train(place, faults=[fault])
        problem = None
        if stopped.status != 128 + fault.signum:
            problem = f"{name}: exit status {stopped.status}"
        elif resume(place).status or differences(expected, training_state(run_folder(place), STEPS)):
            problem = f"{name}: not as uninterrupted"
        table.count("signals to a training of one process", problem)
    if not ddp:
        return
    who: dict[str, Callable[[list[int]], list[int]]] = {
        "rank 0": lambda pids: pids[:1],
        "rank 1": lambda pids: pids[1:],
        "both": lambda pids: pids,
    }
    cases = [(signal.SIGTERM, "rank 0"), (signal.SIGTERM, "rank 1"), (signal.SIGTERM, "both")]
    cases += [(signal.SIGINT, "both"), (signal.SIGUSR1, "rank 0"), (signal.SIGUSR1, "both")]
    for i, (signum, whom) in enumerate(cases):
        place, problem = folder / f"ddp_signal_{i}", None
        leader = processes.start_command(place, *DDP, "trainer.max_steps=100000", "validate_every=100000")
        try:
            processes.wait_for(lambda place=place: list(place.glob("runs/*/checkpoints/step_*.ckpt")), 300)
            pids, began = processes.ranks(leader), time.monotonic()
            for pid in who[whom](pids):
                os.kill(pid, signum)
            status = leader.wait(60)
            waited = time.monotonic() - began
            saved = find_run(run_folder(place)).checkpoint
            step = int(saved.stem.removeprefix("step_"))
            if status != 128 + signum:
                problem = f"{signum.name} to {whom}: exit status {status}"
            elif f"saving at step {step}" not in (place / "output.txt").read_text():
                problem = f"{signum.name} to {whom}: not saved"
            elif waited > 10:
                problem = f"{signum.name} to {whom}: it took {waited:.0f} s to end"
        except subprocess.TimeoutExpired:
            problem = f"{signum.name} to {whom}: hangs"
        finally:
            processes.leave_nothing(leader)
        table.count("signals to a training of two processes (gloo)", problem)


def phases_and_outputs(folder: Path, table: Table, ddp: bool) -> None:
    """Signals in every phase, lost output at any moment, errors in a training, and every precision."""
    trained = run_folder(folder / "baseline" / "no_workers")
    expected = training_state(trained, STEPS)

    def count(row: str, name: str, problem: Callable[[Path], str | None]) -> None:
        place = folder / "phase"
        found = problem(place)
        table.count(row, f"{name}: {found}" if found else None)
        shutil.rmtree(place, ignore_errors=True)

    for case in phases.cases():
        if case.who is None or ddp:
            of = "one process" if case.who is None else "two processes (gloo)"
            row = f"signals to {of} in each phase"
            count(row, case.name, lambda place, case=case: phases.problem_of(case, place, trained))
    for name, fault in phases.lost_outputs():
        row = "output lost during a training"
        count(row, name, lambda place, fault=fault: phases.problem_without_output(fault, place, expected))
    for name in phases.ERRORS:
        row = "an error in a training"
        count(row, name, lambda place, name=name: phases.problem_after_error(name, place, expected))
    for name in (*phases.PRECISIONS, *phases.REFUSED_PRECISIONS):
        row = "precisions, end to end or refused"
        count(row, name, lambda place, name=name: phases.problem_of_precision(name, place))


def hostile_folders(folder: Path, seed: int, every: int, table: Table) -> None:
    """Continues or samples hostile and damaged run folders; see `tests.faults.hostile`."""
    good = hostile.good_run(folder / "good")
    for number, case in enumerate(list(hostile.cases(seed))[::every]):
        place = folder / f"hostile_{number}"
        found = hostile.problem(case, good, place)
        table.count(f"hostile or damaged folders: {case.kind}", found and f"{case.name}: {found}")
        shutil.rmtree(place)


# rows of the table that count tests
TESTED = {
    "tests of malformed image files": "tests/data/test_image_folder.py",
    "bad configurations": "tests/cli/test_bad_input.py::test_train_refuses_in_one_line",
    "hostile targets and checkpoint entries": "tests/faults/test_hostile.py",
    "wandb: unreachable, dying server, killed service": "tests/faults/test_dashboard.py",
    "loss or gradient not finite": "tests/faults/test_numbers.py",
    "writing: damaged files, full disk": "tests/faults/test_writing.py",
}


def tested(table: Table) -> None:
    for name, selection in TESTED.items():
        command = [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=no", selection]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        for line in done.stdout.splitlines():
            outcome, _, test = line.partition(" ")
            if outcome in ("PASSED", "FAILED", "ERROR"):
                table.count(name, None if outcome == "PASSED" else test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=80, help="number of kills of trainings of one process")
    parser.add_argument("--ddp", type=int, default=20, help="number of kills of one of two processes")
    parser.add_argument("--saves", type=int, default=200, help="number of kills during a save")
    parser.add_argument("--drawings", type=int, default=10, help="number of kills of sampling runs")
    parser.add_argument(
        "--hostile", type=int, default=1, help="every n-th hostile or damaged folder; 0 for none"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random instants")
    parser.add_argument("--out", type=Path, help="JSON file for the counts")
    options = parser.parse_args()
    table, chance = Table(), random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="faults_") as name:
        folder = Path(name)
        try:
            if options.hostile:
                hostile_folders(folder, options.seed, options.hostile, table)
            kills(folder, chance, options.kills, table)
            save_kills(folder, chance, options.saves, table)
            sampling_kills(folder, chance, options.drawings, table)
            signals(folder, table, ddp=options.ddp > 0)
            phases_and_outputs(folder, table, ddp=options.ddp > 0)
            if options.ddp:
                ddp_kills(folder, chance, options.ddp, table)
            tested(table)
        finally:
            print(table.markdown())
            if options.out:
                options.out.write_text(json.dumps(table.rows, indent=2))
    sys.exit(any(row["problems"] for row in table.rows.values()))


if __name__ == "__main__":
    main()

"""Runs commands in separate processes, which tests kill or signal.

A fork server imports the framework once. Each command runs in a process forked from it, in a separate session, so
that starting takes a tenth of a second and a kill affects no other process.
"""

import base64
import importlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "src.train",
        "src.app.load",
        "src.app.train",
        "src.generation.tasks",
        "tests.faults.processes",
        "hydra.main",
        "torchvision.utils",
        "sklearn.datasets",
    ]
)

# A training of one or two seconds with checkpoints, validation, previews, scores, dropout and weight averages.
STEPS = 12
TINY = (
    "data=digits",
    "logger=csv",
    "trainer.accelerator=cpu",
    f"trainer.max_steps={STEPS}",
    "model.base_channels=8",
    "model.dropout=0.2",
    "batch_size=16",
    "validate_every=5",
    "sampler.steps=3",
    "callbacks.curves.every=2",
    "callbacks.checkpoints.every=3",
    "callbacks.sample_images.every=4",
    "callbacks.sample_images.n=4",
    "callbacks.track_fidelity.every=6",
    "callbacks.track_fidelity.n=16",
    "callbacks.track_fidelity.batch_size=8",
)


@dataclass(frozen=True)
class Replacement:
    """Replaces a function by replacement(original, number of the call, *arguments).

    Attributes:
        place: the function, "module:attribute.path", in src or a library.
        replacement: a module-level function, which can be pickled.
        rank: the only rank with the replacement; None for all ranks.
        call: number of the only call that is replaced, from 1; None for all calls.
    """

    place: str
    replacement: Callable
    rank: int | None = None
    call: int | None = None

    def install(self, pending: Path) -> None:
        """Replaces the function in this process; the file `pending` is removed when the replacement is called."""
        if self.rank is not None and int(os.environ.get("LOCAL_RANK", "0")) != self.rank:
            return
        owner, name, original = resolve(self.place)
        calls = 0

        def called(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if self.call not in (None, calls):
                return original(*arguments, **named)
            pending.unlink(missing_ok=True)
            return self.replacement(original, calls, *arguments, **named)

        setattr(owner, name, called)


@dataclass(frozen=True)
class Fault:
    """Sends a signal to its own process when a function is called for the n-th time.

    Attributes:
        place: as for `Replacement`. The function is called after the signal.
        call: number n of the call, from 1.
        signum: the signal.
        again: how many times the signal is sent.
        rank: the only rank with the fault; None for all ranks.
        group: whether the signal is sent to all processes of the group, as by Ctrl-C in a terminal.
    """

    place: str
    call: int = 1
    signum: int = signal.SIGKILL
    again: int = 1
    rank: int | None = None
    group: bool = False

    def install(self, pending: Path) -> None:
        """As for `Replacement`."""
        Replacement(self.place, partial(_strike, self), self.rank, self.call).install(pending)


def _strike(fault: Fault, original: Callable, call: int, *arguments: Any, **named: Any) -> Any:
    for _ in range(fault.again):
        os.kill(0 if fault.group else os.getpid(), fault.signum)
    return original(*arguments, **named)


def announce(folder: Path, faults: Sequence[Fault | Replacement]) -> list[Path]:
    """A file for each fault of a command, which the fault removes when its place is reached."""
    pending = [folder / f"{number}_{time.monotonic_ns()}.pending" for number in range(len(faults))]
    for path, fault in zip(pending, faults, strict=True):
        path.write_text(f"{fault.place}, call {fault.call}")
    return pending


def check_reached(folder: Path) -> None:
    """Raises AssertionError if a fault of the commands of this folder did not strike: it would show nothing."""
    missed = [path.read_text() for path in folder.glob("*.pending")]
    assert not missed, f"the fault did not strike: {missed}"


def resolve(place: str) -> tuple[Any, str, Any]:
    """The object that owns the attribute, the name of the attribute and its value."""
    module, _, path = place.partition(":")
    *parents, name = path.split(".")
    owner = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name, getattr(owner, name)


@dataclass
class Command:
    """A command of src in a separate process.

    Attributes:
        folder: its working directory; runs go to folder/runs.
        arguments: the name of the command and its overrides.
        faults: installed in the process before the command starts.
        environment: variables added to the inherited environment.
    """

    folder: Path
    arguments: Sequence[str]
    faults: Sequence[Fault | Replacement] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> "Command":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / f"output_{time.monotonic_ns()}.txt"
        faults = list(zip(self.faults, announce(self.folder, self.faults), strict=True))
        self.process = SERVER.Process(
            target=_main, args=(self.folder, self.log, tuple(self.arguments), faults, self.environment)
        )
        self.process.start()
        return self

    def wait(self, seconds: float = 300) -> int:
        """The exit status as a shell gives it.

        Raises:
            TimeoutError: the process hangs; it is killed.
            AssertionError: a fault did not strike.
        """
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still running after {seconds} s:\n{self.output}")
        check_reached(self.folder)
        return self.process.exitcode if self.process.exitcode >= 0 else 128 - self.process.exitcode

    def signal(self, signum: int) -> None:
        os.kill(self.process.pid, signum)

    def kill(self) -> None:
        """Sends SIGKILL to the process and all its child processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _main(
    folder: Path,
    log: Path,
    arguments: tuple[str, ...],
    faults: Sequence[tuple[Fault | Replacement, Path]],
    environment: dict[str, str],
) -> None:
    os.setsid()
    heed_hangups()
    os.chdir(folder)
    os.environ.update(DIFFUSION_LAB_CACHE=str(folder / "cache"), HYDRA_FULL_ERROR="1", **environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    for fault, pending in faults:
        fault.install(pending)
    name, *overrides = arguments
    sys.argv = [f"src.{name}", *overrides]
    importlib.import_module("src.app.cli").run(name)


def heed_hangups() -> None:
    """Undoes nohup, under which the harness itself may run."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def run(
    folder: Path, *arguments: str, faults: Sequence[Fault | Replacement] = (), **environment: str
) -> Command:
    """Runs a command until it exits; the exit status is `command.status`."""
    command = Command(folder, arguments, faults, environment).start()
    command.status = command.wait()
    return command


def train(
    folder: Path, *overrides: str, faults: Sequence[Fault | Replacement] = (), **environment: str
) -> Command:
    """Runs the training of `TINY` until it exits."""
    return run(folder, "train", *TINY, *overrides, faults=faults, **environment)


def resume(folder: Path, *overrides: str, faults: Sequence[Fault | Replacement] = ()) -> Command:
    """Resumes the newest run, or starts a run if there is no checkpoint."""
    if list(folder.glob("runs/*/checkpoints/step_*.ckpt")):
        return run(folder, "train", "ckpt=last", *overrides, faults=faults)
    return train(folder, *overrides, faults=faults)


def run_folder(folder: Path) -> Path:
    """The run folder with the newest checkpoint."""
    return max(folder.glob("runs/*/checkpoints/step_*.ckpt")).parent.parent


def start_command(
    folder: Path,
    *arguments: str,
    faults: Sequence["Fault | Replacement"] = (),
    **environment: str,
) -> subprocess.Popen:
    """Starts a command, e.g. on two gloo processes, in a new session; output goes to folder/output.txt.

    The command is src.train, unless the first argument is the name of another. After it, call `check_reached`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = "train"
    if arguments[0] in ("train", "sample", "evaluate"):
        name, *arguments = arguments
    module = ["tests.faults.command", name] if faults else [f"src.{name}"]
    command = [sys.executable, "-m", *module, f"runs={folder / 'runs'}", *arguments]
    pending = announce(folder, faults)
    environment["FAULTS"] = base64.b64encode(pickle.dumps(list(zip(faults, pending, strict=True)))).decode()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    cache = {"DIFFUSION_LAB_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    with (folder / "output.txt").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**inherited, **cache, **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=heed_hangups,
        )


DDP = (*TINY, "trainer=ddp", "trainer.devices=2", "trainer.precision=32-true", "trainer.strategy=ddp")


def ranks(leader: subprocess.Popen) -> list[int]:
    """Process IDs of rank 0 and, once it has started, rank 1."""
    own = []
    for child in Path(f"/proc/{leader.pid}/task/{leader.pid}/children").read_text().split():
        with suppress(ProcessLookupError, FileNotFoundError):  # a short-lived child
            if b"LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                own.append(int(child))
    return [leader.pid, *own]


def members(session: int) -> list[int]:
    """Process IDs of the running processes of a session, whose ID is that of its first process."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError, FileNotFoundError):  # the process has ended
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if os.getsid(int(entry.name)) == session and state != "Z":
                found.append(int(entry.name))
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """Polls until the condition is true; returns its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise TimeoutError("the condition did not become true")


def leave_nothing(leader: subprocess.Popen) -> None:
    """Kills all remaining processes of a session."""
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()

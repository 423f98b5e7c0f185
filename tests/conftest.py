"""Fixtures that all tests share."""

import importlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra._internal.hydra import Hydra

from src.app import jobs

ROOT = Path(__file__).parent.parent

# A training run of a few seconds that exercises every component.
QUICK = ("debug=quick", "logger=csv", "trainer.accelerator=cpu", "model.base_channels=16", "batch_size=32")


def pytest_terminal_summary(terminalreporter):
    """Prints how many combinations of the matrix trained and how many were refused, summed over all workers."""
    reports = [
        report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])
    ]
    counts = Counter[str]()
    for report in reports:
        if report.when == "call":
            counts.update({name: n for name, n in report.user_properties if name.startswith("combinations")})
    for name, count in counts.items():
        terminalreporter.write_line(f"{name}: {count}")


@pytest.fixture(autouse=True, scope="session")
def _composition():
    """Registers what Hydra needs to compose conf/ in this process."""
    jobs.register()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Limits torch to one thread: for small tensors, a second thread costs more than it saves."""
    torch.set_num_threads(1)


def commands_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """A function that runs an entry point in this process, in `folder`: call("train", "seed=1") -> exit status.

    Hydra composes each configuration twice, first only to read hydra.mode, which is nowhere set here. Leaving that out
    saves a quarter of a command's time.
    """

    def call(name: str, *overrides: str) -> int:
        monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: None)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        monkeypatch.setenv("DIFFUSION_LAB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(sys, "argv", [f"src.{name}", *overrides])
        try:
            importlib.import_module(f"src.{name}").main()
        except SystemExit as end:
            return end.code or 0
        return 0

    return call


@pytest.fixture
def command(monkeypatch, tmp_path) -> Callable[..., int]:
    """`commands_in` a temporary folder: runs go to tmp_path/runs."""
    return commands_in(tmp_path, monkeypatch)


@pytest.fixture
def only_run(tmp_path) -> Callable[[], Path]:
    """The one run folder under tmp_path/runs."""

    def find() -> Path:
        folders = [path for path in (tmp_path / "runs").iterdir() if path.name != "sweeps"]
        assert len(folders) == 1, folders
        return folders[0]

    return find

"""Sweeps that are killed, by every launcher, and with several processes in a job; see `tests.faults.sweeps`."""

import importlib.util

import pytest

from tests.faults import sweeps

pytestmark = pytest.mark.slow


def test_a_sweep_that_is_killed_ends_like_an_undisturbed_one():
    found = sweeps.kills(times=1, first=0)
    assert found["equal"] == 1, found


@pytest.fixture
def available(monkeypatch):
    """Leaves out launchers whose packages are not installed."""
    packages = {"submitit": "submitit", "ray": "ray"}
    missing = [name for name, package in packages.items() if importlib.util.find_spec(package) is None]
    for name in missing:
        monkeypatch.delitem(sweeps.LAUNCHERS, name)


@pytest.mark.usefixtures("available")
def test_every_launcher_gives_the_same_scores():
    found = sweeps.launchers()
    assert all(found["equal scores"].values()), found
    assert all(found["equal weights"].values()), found


@pytest.mark.usefixtures("available")
def test_two_processes_in_a_job_train_like_one_and_end_together():
    found = sweeps.ddp()
    assert max(found["largest difference"].values()) < 1e-6, found
    assert all(killed["seconds"] < 30 for killed in found["killed rank"].values()), found


def test_a_thousand_jobs_are_listed_in_seconds():
    found = sweeps.thousand(1000)
    assert max(found["list_s"], found["table_s"]) < 10, found
    peaks = list(found["launcher_peak_MB"].values())
    assert peaks[-1] <= peaks[0] + 10, found

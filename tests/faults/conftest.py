"""Fixtures of the fault tests."""

import pytest

from tests.faults.processes import STEPS, run_folder, train
from tests.faults.states import training_state


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The state in which the tiny training ends when nothing happens to it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    door = train(folder)
    assert door.status == 0, door.output
    return training_state(run_folder(folder), STEPS)

"""Fixtures of the fault tests."""

import pytest

from tests.faults.processes import STEPS, run_folder, train
from tests.faults.states import training_state


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The final state of the small training without faults."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    command = train(folder)
    assert command.status == 0, command.output
    return training_state(run_folder(folder), STEPS)

"""Fixtures of the fault tests."""

from collections import Counter

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


# Each case is a training or more. `make test` runs these many of each kind, `make faults` and `make test-all` run all.
FIRST = {
    "test_killed_and_resumed": 3,
    "test_saves_and_exits": 3,
    "test_signals_outside_the_steps": 2,
    "test_hang_is_ended": 1,
    "test_no_validation_is_lost_to_a_signal": 1,
    "test_a_changed_optimiser_is_applied": 2,
    "test_errors_in_a_training": 2,
    "test_long_preview_is_not_a_hang": 0,
    "test_wandb_process_is_killed": 0,
    "test_tasks_of_one_allocation_are_independent": 0,
    "test_requeued_job_of_two_trainings_continues_the_right_one": 0,
    "test_the_best_of_a_later_step_is_set_aside": 0,
    "test_no_point_is_in_the_curves_twice": 0,
    "test_another_experiment_is_refused": 0,
    "test_the_printed_command_continues": 0,
    "test_refusal_does_not_change_the_folder": 0,
    "test_a_run_in_an_oddly_named_folder_is_continued": 0,
    "test_precisions": 0,
    "test_allow_changes_is_not_stored": 0,
}


def pytest_collection_modifyitems(items):
    seen = Counter()
    for item in items:
        name = getattr(item, "originalname", None)
        if name in FIRST:
            seen[name] += 1
            if seen[name] > FIRST[name]:
                item.add_marker(pytest.mark.slow)

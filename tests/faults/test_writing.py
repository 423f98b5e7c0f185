"""Writing checkpoints: kills during a save, damaged files, full disks, non-finite values."""

import errno
import logging
import os
import random
import resource
import signal

import pytest
import torch

from src.errors import UserError
from src.runs.files import damage, sidecar_path
from src.runs.folder import checkpoints_by_step, find_run
from src.training.checkpoint import AtomicCheckpointIO, Checkpoints
from tests.faults.processes import STEPS, Fault, Replacement, resume, run, run_folder, train
from tests.faults.saving import content, kill_while_saving
from tests.faults.states import differences, training_state


@pytest.mark.parametrize("temporary", ["same", "/dev/shm"])
def test_kills_during_saves(tmp_path, temporary):
    """Lightning's writer would truncate the intact file if $TMPDIR is on another filesystem."""
    chance = random.Random(temporary)
    for i in range(4):
        place = str(tmp_path) if temporary == "same" else temporary
        assert not kill_while_saving(tmp_path / str(i), chance, 20, place)


@pytest.fixture
def written(tmp_path):
    """A run folder with checkpoints of steps 1, 2 and 3."""
    for step in (1, 2, 3):
        AtomicCheckpointIO().save_checkpoint(
            content(step, 1), tmp_path / "checkpoints" / f"step_{step:08d}.ckpt"
        )
    return tmp_path


def truncate(path):
    os.truncate(path, path.stat().st_size - 100)


def flip_a_bit(path):
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def truncate_without_record(path):
    truncate(path)
    sidecar_path(path).unlink()


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, truncate_without_record])
def test_last_is_the_newest_valid_checkpoint(written, caplog, harm):
    assert find_run(written).checkpoint.name == "step_00000003.ckpt"
    newest = written / "checkpoints" / "step_00000003.ckpt"
    harm(newest)
    assert find_run(written).checkpoint.name == "step_00000002.ckpt"
    assert "step_00000003.ckpt is damaged" in caplog.text
    with pytest.raises(UserError, match=r"step_00000003\.ckpt is damaged"):
        find_run(newest)
    harm(written / "checkpoints" / "step_00000002.ckpt")
    harm(written / "checkpoints" / "step_00000001.ckpt")
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        find_run(written)


def test_a_checkpoint_without_a_record_is_checked_by_loading_it(written):
    path = written / "checkpoints" / "step_00000003.ckpt"
    sidecar_path(path).unlink()
    assert damage(path) is None


def test_resumes_from_the_checkpoint_before_a_damaged_one(tmp_path, uninterrupted):
    assert train(tmp_path, "trainer.max_steps=9").status == 0
    flip_a_bit(run_folder(tmp_path) / "checkpoints" / "step_00000009.ckpt")
    done = resume(tmp_path, f"trainer.max_steps={STEPS}")
    assert done.status == 0, done.output
    assert "from step 6" in done.output
    assert "renamed to" in done.output
    assert not differences(uninterrupted, training_state(run_folder(tmp_path), STEPS))


def test_the_best_of_a_later_step_is_set_aside(tmp_path):
    # scores at step 8 and at the end, step 9: the best of them is later than step 6
    assert train(tmp_path, "callbacks.track_fidelity.every=8", "trainer.max_steps=9").status == 0
    folder = run_folder(tmp_path) / "checkpoints"
    assert {path.name for path in folder.glob("best*")} == {"best.ckpt", "best.ckpt.json", "best.json"}
    back = run(tmp_path, "train", f"ckpt={folder}/step_00000006.ckpt", "trainer.max_steps=7", "metrics=none")
    assert back.status == 0, back.output
    assert {path.name for path in folder.glob("best*")} == {"best.ckpt.set_aside", "best.json.set_aside"}
    assert resume(tmp_path, "trainer.max_steps=8", "metrics=fd_digits").status == 0
    assert (folder / "best.ckpt").is_file(), "a new best must be saved, regardless of the earlier one"


def test_nonfinite_weights_are_never_written(tmp_path, caplog):
    io, path = AtomicCheckpointIO(), tmp_path / "step_00000001.ckpt"
    io.save_checkpoint(content(1, 1), path)
    before = path.read_bytes()
    poisoned = content(2, 1)
    poisoned["optimizer_states"] = [{"state": {0: {"exp_avg": torch.tensor([0.0, float("nan")])}}}]
    io.save_checkpoint(poisoned, path)
    assert path.read_bytes() == before
    assert "optimizer_states.0.state.0.exp_avg is not finite" in caplog.text
    assert io.failures == 1


def test_keep_must_be_at_least_two():
    with pytest.raises(ValueError, match="keep must be at least 2"):
        Checkpoints("nowhere", {}, keep=1)


def limit_file_size(original, call, *arguments):
    """Limits files to 100 kB; larger writes fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return original(*arguments)


def full_once(original, call, *arguments):
    if call == 2:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return original(*arguments)


def test_full_disk_stops_after_three_failures(tmp_path):
    start = Replacement("src.training.checkpoint:Checkpoints.on_train_start", limit_file_size)
    command = train(tmp_path, faults=[start])
    assert command.status == 2, command.output
    assert command.output.count("disk full, 0.") >= 3
    assert "MB needed" in command.output
    assert "3 checkpoints in a row could not be written" in command.output.splitlines()[-1]
    assert not list(tmp_path.glob("runs/*/checkpoints/*")), "a partial file remains"


def full_from_the_last_step_on(original, call, checkpoint, path):
    if checkpoint["global_step"] > 8:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return original(checkpoint, path)


def full_at_the_last_step_once(original, call, checkpoint, path):
    if call == 3:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return original(checkpoint, path)


WRITE = "src.training.checkpoint:_write"


def nine_steps(folder, writing):
    """max_steps is a multiple of `every`, so that saving the last step is tried twice: at the step and at the end."""
    return train(folder, "metrics=none", "trainer.max_steps=9", faults=[Replacement(WRITE, writing)])


def test_training_fails_if_the_last_step_is_not_saved(tmp_path):
    command = nine_steps(tmp_path, full_from_the_last_step_on)
    assert command.status == 2, command.output
    assert "Done." not in command.output
    assert "disk full" in command.output
    last = command.output.splitlines()[-1]
    assert "step 9 could not be saved" in last
    assert "step_00000006.ckpt" in last


def test_last_save_is_retried(tmp_path):
    command = nine_steps(tmp_path, full_at_the_last_step_once)
    assert command.status == 0, command.output
    assert "disk full" in command.output
    assert find_run(run_folder(tmp_path)).checkpoint.name == "step_00000009.ckpt"


def test_stopped_training_reports_a_failed_save(tmp_path):
    stop = Fault("src.training.module:DiffusionModule.training_step", 9, signal.SIGTERM)
    command = train(tmp_path, "metrics=none", faults=[Replacement(WRITE, full_from_the_last_step_on), stop])
    assert command.status == 128 + signal.SIGTERM, command.output
    assert "step 9 could not be saved" in command.output
    assert "step_00000006.ckpt" in command.output.splitlines()[-1]


def test_training_continues_after_a_full_disk(tmp_path, uninterrupted):
    once = Replacement(WRITE, full_once)
    command = train(tmp_path, faults=[once])
    assert command.status == 0, command.output
    assert "disk full" in command.output
    assert not differences(uninterrupted, training_state(run_folder(tmp_path), STEPS))
    for path in checkpoints_by_step(run_folder(tmp_path) / "checkpoints"):
        assert damage(path) is None


def test_training_continues_without_snapshots_of_the_averages(tmp_path):
    full = Replacement("src.training.ema:EMA.on_train_start", limit_file_size)
    power = (
        "ema=power",
        "ema.snapshot_every=3",
        "trainer.max_steps=6",
        "metrics=none",
        "~callbacks.checkpoints",
    )
    command = train(tmp_path, *power, faults=[full])
    assert command.status == 0, command.output
    assert "snapshot of the averages failed: File too large; training continues" in command.output
    assert not list(tmp_path.glob("runs/*/ema/*"))


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    assert train(tmp_path, "trainer.max_steps=3").status == 0
    leftover = run_folder(tmp_path) / "checkpoints" / ".step_00000006.ckpt.1.tmp"
    leftover.write_bytes(b"half")
    assert resume(tmp_path, "trainer.max_steps=4").status == 0
    assert not leftover.exists()


def test_name_must_not_be_a_path(tmp_path):
    for name in ("../elsewhere", "a/b", ".hidden"):
        command = run(tmp_path, "train", f"name='{name}'")
        assert command.status == 2
        assert "error: name=" in command.output
        assert not (tmp_path / "elsewhere").exists()


def test_warnings_are_shown_before_logging_is_set_up(written, capsys):
    """The fallback to an older checkpoint happens before logging is configured."""
    truncate(written / "checkpoints" / "step_00000003.ckpt")
    handlers, logging.root.handlers = logging.root.handlers, []
    try:
        find_run(written)
    finally:
        logging.root.handlers = handlers
    assert "is damaged" in capsys.readouterr().err

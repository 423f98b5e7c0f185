"""max_device_batch=auto: the choice with a simulated memory, and a training with it."""

import logging
from types import SimpleNamespace

import pytest
import torch

from src.app import device_batch as of_app
from src.data.digits import Digits
from src.errors import UserError
from src.training import device_batch
from src.training.device_batch import largest_predicted, largest_that_runs, micro_batches
from tests.test_conf import composed


def test_micro_batches_divide_the_batch_of_a_device():
    assert micro_batches(24, 2) == [1, 2, 3, 4, 6, 12]


def test_on_an_accelerator_the_largest_that_does_not_run_out_of_memory():
    tried = []

    def run(size):
        tried.append(size)
        if size > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    assert largest_that_runs([1, 2, 4, 8, 16], run) == 4
    assert tried == [16, 8, 4]
    with pytest.raises(UserError, match="does not suffice for 6 images"):
        largest_that_runs([6, 12], run)

    def broken(size):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        largest_that_runs([1, 2], broken)


class Memory:
    """A machine with a memory; a step takes `fixed` once and `each` for every image, at its peak."""

    def __init__(self, total: int, fixed: int, each: int):
        self.total, self.fixed, self.each = total, fixed, each
        self.peak = 0
        self.tried: list[int] = []

    def run(self, size: int) -> None:
        self.tried.append(size)
        self.peak = max(self.peak, self.fixed + self.each * size)
        assert self.peak <= self.total, "the system ends the process"

    def choose(self, sizes: list[int]) -> int:
        return largest_predicted(sizes, self.run, lambda: self.peak, lambda: self.total - self.peak)


def test_on_the_cpu_a_batch_is_predicted_before_it_is_tried():
    memory = Memory(total=1000, fixed=100, each=10)
    assert memory.choose([1, 2, 4, 8, 16, 32, 64, 128]) == 64
    assert memory.tried == [1, 2, 4, 8, 16, 32, 64]
    assert Memory(total=10**6, fixed=100, each=10).choose([1, 2, 4, 8]) == 8


def test_an_allocation_that_fails_on_the_cpu_ends_the_search():
    def run(size):
        if size > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    assert largest_predicted([1, 2, 4], run, lambda: 0, lambda: 1000) == 2
    with pytest.raises(UserError, match="does not suffice for 4 images"):
        largest_predicted([4, 8], run, lambda: 0, lambda: 1000)


def test_the_memory_of_this_machine_is_measured():
    assert 2**20 < device_batch.peak_memory() < 2**45
    assert 2**20 < device_batch.available_memory() < 2**50


def test_a_training_keeps_its_global_batch_and_says_what_was_chosen(command, only_run, monkeypatch, capfd):
    """Simulated: memory for micro-batches of up to 10 images."""
    step = device_batch._Step.__call__

    def limited(self, size):
        if size > 10:
            raise MemoryError
        step(self, size)

    monkeypatch.setattr(device_batch._Step, "__call__", limited)
    monkeypatch.setattr(device_batch, "available_memory", lambda: 2**40)
    quick = ("debug=quick", "logger=csv", "trainer.accelerator=cpu", "metrics=none", "batch_size=32")
    quick = (*quick, "model.base_channels=16", "trainer.max_steps=2", "callbacks=none")
    assert command("train", *quick, "max_device_batch=auto") == 0
    assert "max_device_batch=auto: 4 micro-batches of 8 on each device" in capfd.readouterr().out
    run = only_run()
    assert "max_device_batch: 8" in (run / "config.yaml").read_text()
    # a continued training does not choose anew
    monkeypatch.setattr(of_app, "fitting_batch", lambda *_: pytest.fail("chosen anew"))
    assert command("train", f"ckpt={run}", "max_device_batch=auto", "trainer.max_steps=3") == 0
    assert "max_device_batch: 8" in (run / "config.yaml").read_text()


def test_a_divided_network_is_refused(tmp_path):
    config = composed("train", "trainer=fsdp", "max_device_batch=auto")
    with pytest.raises(
        UserError, match="max_device_batch=auto: trainer=fsdp divides the network; give a number"
    ):
        of_app.with_fitting_batch(config, tmp_path)


def test_the_trial_is_silent_and_reads_no_weights(tmp_path, monkeypatch, caplog):
    trials = []

    def assembled(trial, folder):
        trials.append(trial)
        logging.getLogger("src.app").warning("repeated")
        return SimpleNamespace(
            module=None, trainer=SimpleNamespace(world_size=1), data=SimpleNamespace(source=None)
        )

    monkeypatch.setenv(of_app.CHOSEN, "")  # restored after the test
    monkeypatch.setattr(of_app, "assemble", assembled)
    monkeypatch.setattr(of_app, "fitting_batch", lambda *_: 8)
    config = composed("train", "max_device_batch=auto", "init=another", "batch_size=32")
    assert of_app.with_fitting_batch(config, tmp_path).init == "another"
    assert trials[0].init is None
    assert "repeated" not in caplog.text


def test_latents_are_not_encoded_in_the_trial():
    codec = SimpleNamespace(bounded=False, shape=(4, 2, 2))
    batch = device_batch._batch(SimpleNamespace(batch_size=8, seed=0, codec=codec), Digits(), 4)
    assert batch.images.shape == (4, 4, 2, 2)
    assert batch.images.is_floating_point()

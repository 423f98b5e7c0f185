"""A job runs in any process, as a launcher starts it, and leaves nothing behind in its own."""

import logging
import multiprocessing
import os
import sys

import pytest
import torch.distributed
from hydra import compose, initialize_config_dir

from src.app import jobs
from src.app.options import CONF
from src.errors import UserError

SHORT = [
    "trainer=cpu",
    "logger=csv",
    "callbacks=none",
    "metrics=none",
    "trainer.max_steps=2",
    "validate_every=2",
    "batch_size=8",
    "model.base_channels=8",
    "model.groups=4",
]


def composed(folder, *overrides):
    """The configuration that Hydra would give to a launcher."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*SHORT, *overrides, f"hydra.run.dir={folder}"], return_hydra_config=True)


def launched(config) -> dict[str, float]:
    """What Hydra's launchers call in the process of a job."""
    from hydra.core.utils import HydraContext, run_job, setup_globals

    class NoCallbacks:
        def __getattr__(self, name):
            return lambda **_: None

    setup_globals()
    context = HydraContext(config_loader=None, callbacks=NoCallbacks())
    done = run_job(jobs.job, config, "hydra.run.dir", None, hydra_context=context, configure_logging=False)
    return done.return_value  # raises what the job raised


def in_a_fresh_process(config, queue):
    queue.put(launched(config))


@pytest.mark.slow
def test_a_job_in_a_fresh_process_gives_the_numbers_of_this_one(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    config = composed(tmp_path / "there", "name=x_${unique:}")  # of a resolver that the process must register
    process = context.Process(target=in_a_fresh_process, args=(config, queue))
    process.start()
    there = queue.get(timeout=60)
    process.join(30)
    assert process.exitcode == 0
    here = launched(composed(tmp_path / "here"))
    assert here == pytest.approx(there, rel=1e-6)


def test_a_job_leaves_no_state_behind(tmp_path):
    root = logging.getLogger()
    handler = logging.StreamHandler()
    root.addHandler(handler)

    def state():
        formatters = [one.formatter for one in root.handlers]
        return list(sys.argv), dict(os.environ), root.level, formatters, torch.distributed.is_initialized()

    try:
        before = state()
        first = launched(composed(tmp_path / "first", "seed=1"))
        assert state() == before
        with pytest.raises(UserError, match="parameterization=eps"):  # it says nothing of x0 in pure noise
            launched(composed(tmp_path / "failing", "schedule=jsd"))
        assert state() == before
        assert launched(composed(tmp_path / "again", "seed=1")) == first
    finally:
        root.removeHandler(handler)

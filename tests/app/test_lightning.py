"""Lightning's options and callbacks: those without the effect they name are refused in one line."""

import inspect

import pytest
from lightning.pytorch import Trainer, callbacks
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import OmegaConf

from src.app.lightning import (
    REFUSED,
    UNFIT,
    check_callback,
    check_monitors,
    check_trainer,
    check_trainer_options,
    skip_idle_work,
)
from src.errors import UserError
from src.training.resume import PASSIVE


def config(**options):
    defaults = {"max_steps": 3, "gradient_clip_val": 1.0, "precision": "32-true", "strategy": "auto"}
    return OmegaConf.create({"trainer": defaults | options})


# Options that are accepted, with where their effect is tested or seen.
ACCEPTED = {
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "precision",
    "max_steps",
    "max_time",
    "limit_val_batches",
    "log_every_n_steps",
    "gradient_clip_val",
    "deterministic",
    "benchmark",
    "inference_mode",
    "profiler",
    "detect_anomaly",
    "sync_batchnorm",
}


def test_every_option_of_the_trainer_is_decided():
    """A new version of Lightning with another option fails here."""
    options = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert options == ACCEPTED | set(REFUSED)
    assert not ACCEPTED & set(REFUSED)


def test_every_callback_of_lightning_is_decided():
    bases = {"Callback", "Checkpoint", "LambdaCallback", "ProgressBar"}  # none of them can be configured
    unknown = {"SpikeDetection"}  # makes a resume approximate
    assert set(callbacks.__all__) - bases - unknown == set(PASSIVE) | set(UNFIT)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_options(name):
    with pytest.raises(UserError, match=f"^trainer.{name}: the framework decides this; "):
        check_trainer_options(config(**{name: 1}))


@pytest.mark.parametrize("precision", ["16-true", "transformer-engine", "transformer-engine-float16"])
def test_refused_precisions(precision):
    with pytest.raises(UserError, match=f"^trainer.precision={precision}: .*; choose bf16-mixed"):
        check_trainer_options(config(precision=precision))


@pytest.mark.filterwarnings("ignore")
def test_what_lightning_makes_of_the_options():
    cpu = {"accelerator": "cpu", "devices": 1, "logger": False}
    for precision in ("64-true", "bf16-mixed", "bf16-true", "bf16", "32", 32):
        check_trainer(Trainer(precision=precision, **cpu), config(precision=precision))
    with pytest.raises(UserError, match="16-mixed: this device would use bf16-mixed"):
        check_trainer(Trainer(precision="16-mixed", **cpu), config(precision="16-mixed"))
    check_trainer(Trainer(strategy=DDPStrategy(), **cpu), config(strategy="ddp"))
    with pytest.raises(UserError, match=r"trainer\.strategy=ddp_spawn: .*; choose auto or ddp"):
        check_trainer(Trainer(strategy="ddp_spawn", **cpu), config(strategy="ddp_spawn"))


def test_refused_callbacks():
    class Mine(callbacks.BaseFinetuning):
        pass

    for callback in (callbacks.ModelPruning("l1_unstructured"), callbacks.EMAWeightAveraging(), Mine()):
        with pytest.raises(UserError, match=r"^callbacks\.x: "):
            check_callback(callback, "callbacks.x")
    check_callback(callbacks.EarlyStopping("val/loss"), "callbacks.x")


def test_monitors():
    losses = ["val/loss", "val/loss_ema"]
    check_monitors({"callbacks.stop": callbacks.EarlyStopping("val/loss_ema")}, losses)
    check_monitors({"callbacks.kept": callbacks.ModelCheckpoint()}, losses)
    wrong = {"callbacks.stop": callbacks.EarlyStopping("val/los")}
    with pytest.raises(
        UserError, match=r"^callbacks\.stop\.monitor=val/los: choose val/loss or val/loss_ema$"
    ):
        check_monitors(wrong, losses)

    class Logging(callbacks.Callback):
        """Of another package, it may log anything."""

    check_monitors({**wrong, "callbacks.mine": Logging()}, losses)


def test_only_empty_hooks_are_passed_over():
    class Counts(callbacks.Callback):
        def on_after_backward(self, *_):
            pass

    counts, given = Counts(), callbacks.LambdaCallback(on_train_batch_end=print)
    trainer = Trainer(callbacks=[counts, given], logger=False, enable_checkpointing=False, accelerator="cpu")
    skip_idle_work(trainer)
    assert callable(counts.on_after_backward)
    assert counts.on_train_batch_end is None
    assert callable(counts.on_train_end)
    assert given.on_train_batch_end is print
    assert given.on_after_backward is None

"""Which of Lightning's options and callbacks a training takes: those that have the effect they name here."""

import logging
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from omegaconf import DictConfig
from pydantic import PositiveFloat, PositiveInt

from src.app.build import check_value
from src.errors import UserError
from src.model import Network
from src.training.callbacks import SampleImages, TrackFidelity
from src.training.module import DiffusionModule
from src.training.sharded import ShardedStrategy

# Trainer options that are refused, and what to do instead.
REFUSED = {
    "accumulate_grad_batches": "use max_device_batch=... (batch_size is global)",
    "barebones": "choose callbacks=none logger=csv metrics=none",
    "val_check_interval": "use validate_every=...",
    "check_val_every_n_epoch": "use validate_every=...",
    "limit_train_batches": "use trainer.max_steps=..., or debug=quick",
    "limit_test_batches": "a training does not test",
    "limit_predict_batches": "a training does not predict",
    "overfit_batches": "use debug=overfit",
    "fast_dev_run": "use debug=quick",
    "max_epochs": "use trainer.max_steps=...",
    "min_epochs": "use trainer.max_steps=...",
    "min_steps": "use trainer.max_steps=...",
    "reload_dataloaders_every_n_epochs": "there are no epochs",
    "logger": "use logger=...",
    "callbacks": "use callbacks=... or '+callbacks.mine={_target_: ...}'",
    "plugins": "checkpoints and environment are its own",
    "default_root_dir": "use runs=... or hydra.run.dir=...",
    "enable_autolog_hparams": "the configuration is logged",
    "enable_progress_bar": "use ~callbacks.progress",
    "enable_checkpointing": "use callbacks.checkpoints.every=...",
    "enable_model_summary": "a summary is printed",
    "gradient_clip_algorithm": "the global norm is clipped",
    "model_registry": "checkpoints are in the run folder",
    "use_distributed_sampler": "the stream shares out its positions",
    "num_sanity_val_steps": "everything is checked before the first step",
}

FLOAT16 = "float16 weights lose small updates"
LAYERS = "it replaces the network's layers"
# Precisions that are refused, with the reason.
PRECISIONS = {
    "16-true": FLOAT16,
    "transformer-engine": LAYERS,
    "transformer-engine-float16": LAYERS,
}
# Lightning's names for a precision that are not its own words.
ALIASES = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}

EPOCHS = "it acts at the end of epochs, which this training does not have"
# Lightning's callbacks that are refused, with the reason.
UNFIT = {
    "BackboneFinetuning": EPOCHS,
    "BaseFinetuning": EPOCHS,
    "BasePredictionWriter": "a training does not predict",
    "BatchSizeFinder": "it would change batch_size; use max_device_batch=...",
    "EMAWeightAveraging": "use ema=...",
    "GradientAccumulationScheduler": "use max_device_batch=...",
    "LearningRateFinder": "it trains and restarts; sweep optimizer.lr=... instead",
    "ModelPruning": EPOCHS,
    "OnExceptionCheckpoint": "an error saves anyway",
    "StochasticWeightAveraging": "use ema=...",
    "WeightAveraging": "use ema=...",
}


HOOKS_OF_A_STEP = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class NoProfiler(PassThroughProfiler):
    """Lightning's default without its cost: about 60 generators are made and entered at each step."""

    def __init__(self) -> None:
        super().__init__()
        self._nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:
        return self._nothing


def skip_idle_work(trainer: Trainer) -> None:
    """Lets Lightning leave out work that has no effect on a training step.

    It calls each hook of a step on each callback, within a context manager and with a formatted name: six hooks of some
    ten callbacks, most of which do nothing. It passes over hooks that cannot be called. It also inspects the signature
    of `training_step` at each step.
    """
    trainer.fit_loop.epoch_loop._build_kwargs = lambda kwargs, batch, batch_idx: OrderedDict(
        batch=batch, batch_idx=batch_idx
    )
    for callback in trainer.callbacks:
        for hook in HOOKS_OF_A_STEP:
            own = hook in vars(callback) or getattr(type(callback), hook) is not getattr(Callback, hook)
            if not own:
                setattr(callback, hook, None)


def check_trainer_options(config: DictConfig) -> None:
    """Checks the options of the Trainer before it is built.

    Raises:
        UserError: an option that the framework decides, or that would have no effect; or a precision that is refused.
    """
    for name in config.trainer:
        if name in REFUSED:
            raise UserError(f"trainer.{name}: the framework decides this; {REFUSED[name]}")
    check_value(PositiveInt, config.trainer.max_steps, "trainer.max_steps")
    check_value(PositiveFloat | None, config.trainer.gradient_clip_val, "trainer.gradient_clip_val")
    precision = config.trainer.get("precision")
    if precision in PRECISIONS:
        raise UserError(
            f"trainer.precision={precision}: {PRECISIONS[precision]}; choose bf16-mixed, bf16-true, 16-mixed (on GPUs),"
            " 32-true or 64-true"
        )


def check_trainer(trainer: Trainer, config: DictConfig) -> None:
    """Checks what Lightning has made of the options.

    Raises:
        UserError: a precision that this device does not have, or a strategy whose weights are not whole on each device.
    """
    precision = str(config.trainer.get("precision") or trainer.precision)
    if trainer.precision != ALIASES.get(precision, precision):
        raise UserError(
            f"trainer.precision={precision}: this device would use {trainer.precision}; choose that, or another device"
        )
    strategy = trainer.strategy
    started = getattr(strategy, "_start_method", "popen")
    known = isinstance(strategy, SingleDeviceStrategy | ShardedStrategy) or type(strategy) is DDPStrategy
    if not known or started != "popen":
        raise UserError(
            f"trainer.strategy={config.trainer.strategy}: weights are averaged and saved whole, by processes that are"
            " started as commands; choose auto or ddp, or trainer=fsdp"
        )
    if trainer.profiler is not None:  # they report at a level that is silenced otherwise
        logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)


def check_sharded(trainer: Trainer, module: DiffusionModule, compiled: bool) -> None:
    """Checks that nothing needs the whole network on one device, if it is divided among them.

    Raises:
        UserError: something does.
    """
    if not isinstance(trainer.strategy, ShardedStrategy):
        return
    network = module.denoiser.network
    whole = [type(c).__name__ for c in trainer.callbacks if isinstance(c, SampleImages | TrackFidelity)]
    if whole:
        raise UserError(
            f"trainer=fsdp: {' and '.join(whole)} need the whole network on one device; choose callbacks=none, and"
            " score checkpoints with src.evaluate"
        )
    if trainer.limit_val_batches != 0:
        raise UserError(
            "trainer=fsdp: validation needs the whole network on one device; choose trainer.limit_val_batches=0"
        )
    if module.ema is not None and module.ema.device is not None:
        raise UserError(
            "trainer=fsdp: averages lie where the parts of the weights do; choose ema.device=null"
        )
    if compiled:
        raise UserError("trainer=fsdp: compile=true is not supported with it; leave it out")
    if len(list(module.parameters())) > len(list(network.parameters())):
        raise UserError(
            "trainer=fsdp: this loss or its regularizer has weights of its own, e.g. a learned weighting; choose"
            " another"
        )
    if type(network).after_optimizer_step is not Network.after_optimizer_step:
        raise UserError(
            f"trainer=fsdp: {type(network).__name__} changes its weights after each step; choose trainer=ddp"
        )


def check_callback(callback: Callback, option: str) -> None:
    """Refuses those of Lightning's callbacks that have no effect here, or the wrong one.

    Raises:
        UserError: one of them.
    """
    for base in type(callback).__mro__:
        if base.__module__.startswith("lightning.pytorch.") and base.__name__ in UNFIT:
            raise UserError(f"{option}: {type(callback).__name__}: {UNFIT[base.__name__]}")


def check_monitors(callbacks: dict[str, Callback], losses: Iterable[str]) -> None:
    """Checks which value early stopping and checkpoints follow.

    Args:
        callbacks: by option. If one is from another package, it may log further values, and nothing is checked.
        losses: the values that this training has.

    Raises:
        UserError: a value that this training does not have.
    """
    if any(not type(each).__module__.startswith(("src.", "lightning.")) for each in callbacks.values()):
        return
    for option, callback in callbacks.items():
        monitor = getattr(callback, "monitor", None)
        if isinstance(callback, EarlyStopping | ModelCheckpoint) and monitor not in (None, *losses):
            raise UserError(f"{option}.monitor={monitor}: choose {' or '.join(losses)}")


def joined_arguments(node: Any, target: type | None, folder: Any) -> dict[str, Any]:
    """Arguments that Lightning's own callbacks are given: checkpoints are written where runs are looked for."""
    writes = target is not None and issubclass(target, ModelCheckpoint) and "dirpath" not in node
    return {"dirpath": str(folder)} if writes else {}

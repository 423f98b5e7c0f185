"""The largest micro-batch that fits into the memory of a device: `max_device_batch=auto`.

A few training steps are tried. On an accelerator the largest batch comes first, and a batch that does not fit raises an
error. On the CPU the system would end the process instead, so batches grow, and what the next one needs is predicted
from the peak of the last one.
"""

import ctypes
import gc
import logging
import re
import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.memory import is_oom_error

from src.data.datamodule import ImageDataModule
from src.data.source import ImageSource
from src.data.stream import Batch
from src.errors import UserError
from src.training.module import DiffusionModule
from src.training.nonfinite import clip_or_skip

log = logging.getLogger(__name__)

MARGIN = 0.8
"""The part of the memory that may be used; the rest is for validation, previews and fragmentation."""


def micro_batches(batch_size: int, devices: int) -> list[int]:
    """The sizes of micro-batches into which the batch of one device can be divided, ascending."""
    largest = batch_size // devices
    return [size for size in range(1, largest + 1) if largest % size == 0]


def largest_that_runs(sizes: Sequence[int], run: Callable[[int], None]) -> int:
    """The largest batch size that does not run out of memory, tried from the largest on.

    Args:
        sizes: ascending.
        run: a training step with so many images.

    Raises:
        UserError: none of them.
    """
    for size in reversed(sizes):
        try:
            run(size)
            return size
        except RuntimeError as error:
            if not is_oom_error(error):
                raise
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise _too_little(sizes[0])


def largest_predicted(
    sizes: Sequence[int],
    run: Callable[[int], None],
    peak: Callable[[], int],
    available: Callable[[], int],
) -> int:
    """The largest batch size whose memory is available; each is predicted before it is tried.

    Memory is at most proportional to the batch, since weights and optimiser do not grow with it.

    Args:
        sizes: ascending.
        run: a training step with so many images.
        peak: the largest memory of this process so far, in bytes.
        available: bytes that this process can still take.

    Raises:
        UserError: not even the smallest one.
    """
    before, chosen = peak(), None
    for size in sizes:
        if chosen is not None:
            grown = peak() - before
            if grown * (size / chosen - 1) > MARGIN * available():
                break
        try:
            run(size)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not is_oom_error(error):
                raise
            break
        chosen = size
    if chosen is None:
        raise _too_little(sizes[0])
    return chosen


def _too_little(size: int) -> UserError:
    return UserError(
        f"max_device_batch=auto: the memory does not suffice for {size} image{'s' if size > 1 else ''}; choose a"
        " smaller network, or trainer.precision=bf16-mixed"
    )


def fitting_batch(module: DiffusionModule, trainer: Trainer, source: ImageSource) -> int:
    """The largest micro-batch of a training on one of its devices. The module is not usable afterwards.

    Args:
        module: freshly assembled.
        trainer: gives devices and precision.
        source: the data.

    Raises:
        UserError: not even one image fits.
    """
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(0.95, device)
    source.check()
    source.prepare()
    sizes = micro_batches(module.batch_size, trainer.world_size)
    run = _Step(module, trainer, source)
    try:
        if device.type != "cpu":
            return largest_that_runs(sizes, run)
        here = trainer.strategy.num_processes if hasattr(trainer.strategy, "num_processes") else 1
        reset_peak()
        return largest_predicted(sizes, run, peak_memory, lambda: available_memory() // here)
    finally:
        module.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)


class _Step:
    """A training step with a given number of images. It holds optimiser, average, and the gradients of other ranks."""

    def __init__(self, module: DiffusionModule, trainer: Trainer, source: ImageSource):
        self.module, self.source = module, source
        self.device, self.precision = trainer.strategy.root_device, trainer.precision_plugin
        self.precision.convert_module(module)
        module.to(self.device)
        module.codec.to(self.device)
        made = module.configure_optimizers()
        self.optimizer = made["optimizer"] if isinstance(made, dict) else made
        if module.ema is not None:
            module.ema.start(module.denoiser.network)
        several = trainer.world_size > 1
        self.exchanged = [torch.empty_like(p) for p in module.parameters()] if several else []

    def __call__(self, size: int) -> None:
        batch = _batch(self.module, self.source, size).to(self.device)
        with self.precision.forward_context():
            loss = self.module.training_step(batch, 0)["loss"]
        loss.backward()
        clip_or_skip(self.optimizer, self.module.parameters(), float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _batch(module: DiffusionModule, source: ImageSource, size: int) -> Batch:
    """The first images of the training stream; noise instead of latents, which a training reads from the cache."""
    data = ImageDataModule(source, module.batch_size, module.seed, accumulation=module.batch_size // size)
    batch = next(iter(data.train_dataloader()))
    if not module.codec.bounded:
        batch = replace(batch, images=torch.randn(size, *module.codec.shape))
    return batch


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int:
    """Bytes of memory that this process can still take: of the machine, and of its control group if it is limited."""
    found = []
    with suppress(OSError, AttributeError):
        text = Path("/proc/meminfo").read_text()
        found.append(int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) * 1024)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            folder = Path("/sys/fs/cgroup")
            found.append(int((folder / limit).read_text()) - int((folder / used).read_text()))
    return max(0, min(found)) if found else 2**62


def reset_peak() -> None:
    """Returns freed memory to the system, so that the growth of the peak is that of the steps."""
    gc.collect()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

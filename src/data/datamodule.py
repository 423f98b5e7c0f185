"""The Lightning data module over a source of images."""

import os
import signal
from collections.abc import Iterator
from multiprocessing import active_children, parent_process
from multiprocessing.util import Finalize
from threading import Thread
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from src.data.codec import Codec
from src.data.source import ImageSet, ImageSource, Split
from src.data.stream import Batch, FixedOrder, PositionSampler, ShardSampler, TrainingStream
from src.errors import UserError


def per_device_batch(batch_size: int, world_size: int, accumulation: int) -> int:
    """Samples of one forward pass on one device.

    Args:
        batch_size: samples of one optimiser step, over all devices and accumulated micro-batches.
        world_size: number of devices (processes), over all machines.
        accumulation: micro-batches of one optimiser step.

    Raises:
        ValueError: if the division leaves a rest; names the nearest sizes that would do.
    """
    parts = world_size * accumulation
    if batch_size < 1 or batch_size % parts:
        below, above = batch_size // parts * parts, -(-max(batch_size, 1) // parts) * parts
        choice = f"{below} or {above}" if below > 0 else f"{above}"
        devices = f"{world_size} device{'s' if world_size > 1 else ''}"
        accumulated = f" * {accumulation} accumulated micro-batches" if accumulation > 1 else ""
        raise ValueError(
            f"batch_size={batch_size} is not divisible by {devices}{accumulated}: choose {choice}"
        )
    return batch_size // parts


class ImageDataModule(LightningDataModule):
    """Loaders over a source's splits. Training is endless: set `max_steps` (not epochs), an integer
    `val_check_interval`, `check_val_every_n_epoch=None` and `use_distributed_sampler=False` on the Trainer.

    The state is one integer, `samples`: how many samples the optimiser has consumed. It is counted from
    optimiser steps, so batches that were prefetched but not used do not count, and a resumed run continues with
    the next sample even if batch size, devices or workers have changed.

    Args:
        source: the data set.
        batch_size: samples of one optimiser step, over all devices and accumulated micro-batches.
        seed: the run's seed; decides order and flips.
        workers: processes that prepare batches; 0 is fastest for sets in memory.
        accumulation: micro-batches of one optimiser step; the Trainer's `accumulate_grad_batches`.
        codec: keeps encoded images, if it is one that does.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        seed: int,
        workers: int = 0,
        accumulation: int = 1,
        codec: Codec | None = None,
    ):
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("workers", workers, 0),
            ("accumulation", accumulation, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.workers = workers
        self.accumulation = accumulation
        self.codec = codec
        self._encoded: dict[Split, ImageSet] = {}
        self._resumed: int | None = None
        self._start = 0
        self._start_step = 0

    @property
    def samples(self) -> int:
        """Samples that the optimiser has consumed, over all devices."""
        if self.trainer is None:
            return self._start
        return self._start + (self.trainer.global_step - self._start_step) * self.batch_size

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict["samples"]

    def prepare_data(self) -> None:
        self.source.check()
        self.source.prepare()
        # captions and latents are made once, before other processes read them
        if self.source.text_encoder is not None or (self.codec is not None and not self.codec.bounded):
            for split in ("train", "validation"):
                self._split(split)

    def _split(self, split: Split) -> ImageSet:
        if self.codec is None:
            return self.source.split(split)
        if split not in self._encoded:
            self._encoded[split] = self.codec.encoded(self.source, split)
        return self._encoded[split]

    def train_dataloader(self) -> DataLoader:
        """Endless batches, from the sample after those that the loaded checkpoint has consumed.

        Raises:
            ValueError: if batch_size cannot be shared out, or the Trainer's accumulation is another one.
        """
        rank, world_size = self._place()
        if self.trainer is not None:
            if self.trainer.accumulate_grad_batches != self.accumulation:
                raise ValueError(
                    f"accumulation={self.accumulation} differs from the Trainer's "
                    f"accumulate_grad_batches={self.trainer.accumulate_grad_batches}: set both to the same"
                )
            # Only here: Lightning restores the data module before the step count; loaders come after both.
            self._start_step = self.trainer.global_step
            self._start = self._start_step * self.batch_size if self._resumed is None else self._resumed
            self._resumed = None
        micro = per_device_batch(self.batch_size, world_size, self.accumulation)
        on_accelerator = self.trainer is not None and self.trainer.strategy.root_device.type != "cpu"
        stream = TrainingStream(
            *(self._split("train"), self.seed, self.batch_size, self.source.horizontal_flip),
            flip_later=on_accelerator,
        )
        sampler = PositionSampler(
            self._start, self.batch_size, micro, rank, world_size, accumulation=self.accumulation
        )
        return self._loader(stream, sampler)

    def val_dataloader(self) -> DataLoader | list:
        return self._fixed_loader("validation")

    def test_dataloader(self) -> DataLoader | list:
        return self._fixed_loader("test")

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _fixed_loader(self, split: Split) -> DataLoader | list:
        rank, world_size = self._place()
        images = self._split(split)
        if len(images) == 0:
            return []
        micro = per_device_batch(self.batch_size, world_size, self.accumulation)
        return self._loader(FixedOrder(images), ShardSampler(len(images), micro, rank, world_size))

    def _loader(self, dataset: Dataset, sampler: Sampler) -> DataLoader:
        if self.workers:
            # before multiprocessing's own, which would wait for workers that ignore its signal
            Finalize(None, _kill_workers, exitpriority=10)
        return _Loader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.workers,
            collate_fn=_already_a_batch,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.workers > 0,
            worker_init_fn=_end_with_the_training,
        )


class _Loader(DataLoader):
    """Raises a worker's UserError with its own text; PyTorch makes the worker's whole traceback its text."""

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from super().__iter__()
        except UserError as error:
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


def _end_with_the_training(worker: int) -> None:
    """Makes a worker ignore signals to the process group, which the training handles, and end when the training ends.

    PyTorch's own watch is for the death of the process that forked the worker, which is a fork server where that
    is the start method (the default from Python 3.14 on), and the server waits for its workers.
    """
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _kill_workers() -> None:
    for child in active_children():
        if child.daemon:
            child.kill()


def _already_a_batch(batch: Batch) -> Batch:
    return batch

from itertools import islice
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch.nn.functional import cross_entropy

from src.data.datamodule import ImageDataModule, per_device_batch
from src.data.digits import Digits
from src.data.stream import Batch


class Probe(pl.LightningModule):
    """A linear classifier that records the positions of its batches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(64, 10)
        self.trained, self.validated = [], []

    def training_step(self, batch, index):
        self.trained.append(batch.positions)
        return cross_entropy(self.head(batch.images.flatten(1) / 127.5 - 1), batch.condition.labels)

    def validation_step(self, batch, index):
        self.validated.append(batch.positions)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data, steps, module=None, ckpt_path=None, **options):
    module = module or Probe()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        check_val_every_n_epoch=None,
        val_check_interval=4,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        accumulate_grad_batches=data.accumulation,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, module


@pytest.fixture(scope="module")
def source():
    return Digits()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_run_is_bit_identical(tmp_path, source, workers, accumulation):
    def data():
        return ImageDataModule(source, 96, seed=3, workers=workers, accumulation=accumulation)

    _, whole = fit(data(), 20)
    trainer, _ = fit(data(), 11)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, resumed = fit(data(), 20, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(torch.cat(resumed.trained), torch.arange(11 * 96, 20 * 96))
    assert torch.equal(resumed.head.weight, whole.head.weight)


def test_state_is_one_integer_and_survives_another_batch_size(tmp_path, source):
    first = ImageDataModule(source, 96, seed=3, workers=2, accumulation=2)
    trainer, _ = fit(first, 10)
    assert first.state_dict() == {"samples": 960}
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = ImageDataModule(source, 32, seed=3)
    trainer, module = fit(second, 13, ckpt_path=tmp_path / "last.ckpt")
    assert module.trained[0][0] == 960
    assert second.state_dict() == {"samples": 960 + 3 * 32}
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    third = ImageDataModule(source, 96, seed=3)
    _, module = fit(third, 14, ckpt_path=tmp_path / "last.ckpt")
    assert module.trained[0][0] == 1056


def test_a_new_trainer_starts_from_zero_and_the_same_trainer_continues(source):
    data = ImageDataModule(source, 64, seed=3)
    trainer, module = fit(data, 5)
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(module, data)
    assert module.trained[5][0] == 5 * 64
    _, other = fit(data, 2)
    assert other.trained[0][0] == 0


def test_validation_is_the_split_in_order(source):
    data = ImageDataModule(source, 64, seed=3)
    _, module = fit(data, 4)
    assert torch.equal(torch.cat(module.validated), torch.arange(147))
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(batch.condition.labels, source.split("validation").labels[batch.positions])


def test_works_without_a_trainer(source):
    data = ImageDataModule(source, 8, seed=0)
    assert next(iter(data.train_dataloader())).images.shape == (8, 1, 8, 8)
    assert sum(len(b.images) for b in data.test_dataloader()) == 146
    assert data.state_dict() == {"samples": 0}


def test_accumulation_must_equal_that_of_the_trainer(source):
    data = ImageDataModule(source, 64, seed=3)
    data.trainer = pl.Trainer(accelerator="cpu", accumulate_grad_batches=2, logger=False)
    with pytest.raises(ValueError, match="accumulate_grad_batches=2"):
        data.train_dataloader()


def on_rank(rank, world_size, **options):
    data = ImageDataModule(Digits(), 24, seed=3, **options)
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        global_step=0,
        accumulate_grad_batches=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return data


def test_ranks_partition_each_step_and_the_validation_split():
    ranks = [on_rank(rank, 3) for rank in range(3)]
    for step, batches in enumerate(islice(zip(*(r.train_dataloader() for r in ranks), strict=True), 5)):
        positions = torch.cat([b.positions for b in batches])
        assert torch.equal(positions, torch.arange(24 * step, 24 * step + 24))
    counts = {len(r.val_dataloader()) for r in ranks}
    indices = torch.cat([b.positions for r in ranks for b in r.val_dataloader()])
    assert len(counts) == 1
    assert torch.equal(indices.sort().values, torch.arange(147))


def test_indivisible_batch_is_refused_before_training():
    with pytest.raises(ValueError, match="5 devices: choose 20 or 25"):
        on_rank(0, 5).train_dataloader()


def test_lightning_moves_batches():
    batch = next(iter(ImageDataModule(Digits(num_classes=0), 8, seed=0).train_dataloader()))
    moved = move_data_to_device(batch, torch.device("meta"))
    assert isinstance(moved, Batch)
    assert moved.condition.labels is None
    assert moved.images.is_meta
    assert moved.positions.device.type == "cpu"  # reading positions must not synchronise with the device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_pinned_for_cuda():
    data = on_rank(0, 1)
    data.trainer.strategy.root_device = torch.device("cuda")
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, Batch)
    assert batch.images.is_pinned()
    assert batch.condition.labels.is_pinned()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((128, 3, 1), "batch_size=128 is not divisible by 3 devices: choose 126 or 129"),
        ((2, 4, 1), "choose 4"),
        ((10, 1, 4), "4 accumulated micro-batches: choose 8 or 12"),
        ((0, 1, 1), "batch_size=0 .* choose 1"),
    ],
)
def test_error_for_an_indivisible_batch_names_the_nearest_sizes(numbers, message):
    with pytest.raises(ValueError, match=message):
        per_device_batch(*numbers)


def test_per_device_batch():
    assert per_device_batch(128, 4, 2) == 16


@pytest.mark.parametrize("wrong", [{"workers": -1}, {"accumulation": 0}, {"batch_size": 0}])
def test_invalid_arguments_are_refused(source, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ImageDataModule(**{"source": source, "batch_size": 8, "seed": 0} | wrong)

"""Images a second of the training stream, against torchvision and the usual DataLoader.

    OMP_NUM_THREADS=1 python -m benchmarks.data

All rows read the same random pixels, in shuffled order, with mirroring, into float32 batches in [-1, 1].
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from src.data.datamodule import ImageDataModule
from src.data.source import ImageSource, InMemoryImages

BATCH = 128
SECONDS = 2.0
SHAPES = {"28x28x1": (20_000, 1, 28), "32x32x3": (20_000, 3, 32)}


class Given(ImageSource):
    """A source around pixels that are there already."""

    name = "given"

    def __init__(self, pixels: torch.Tensor):
        super().__init__(pixels.shape[-1], pixels.shape[1], 10, True)
        self.pixels = pixels

    def _load(self, split):
        return InMemoryImages(self.pixels, torch.arange(len(self.pixels)) % 10)


class Torchvision(Dataset):
    """What torchvision's MNIST and CIFAR10 do for each item: an array row, a PIL image, the transforms."""

    def __init__(self, pixels: torch.Tensor):
        self.arrays = pixels.permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy()
        channels = pixels.shape[1]
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * channels, (0.5,) * channels),
            ]
        )

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int):
        return self.transform(Image.fromarray(self.arrays[index])), index % 10


def endless(loader: DataLoader) -> Iterator:
    return itertools.chain.from_iterable(itertools.repeat(loader))


def images_per_second(batches: Iterator) -> float:
    """Over `SECONDS`, after the workers have started and two batches have been read."""
    for _ in range(2):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        count += len(next(batches)[0])
    return count / (time.perf_counter() - start)


def rows(pixels: torch.Tensor) -> dict[str, Callable[[], Iterator]]:
    def ours(workers: int) -> Iterator:
        return iter(ImageDataModule(Given(pixels), BATCH, seed=0, workers=workers).train_dataloader())

    def theirs(workers: int) -> Iterator:
        return endless(
            DataLoader(
                Torchvision(pixels),
                BATCH,
                shuffle=True,
                drop_last=True,
                num_workers=workers,
                persistent_workers=workers > 0,
            )
        )

    return {
        "torchvision, DataLoader, 2 workers": lambda: theirs(2),
        "torchvision, DataLoader, 0 workers": lambda: theirs(0),
        "training stream, 0 workers": lambda: ours(0),
        "training stream, 2 workers": lambda: ours(2),
    }


def folder_rows() -> dict[str, float]:
    """Images a second of a folder of 256x256 JPEGs scaled to 64x64: indexing, decoding again, from memory."""
    from src.data.image_folder import ImageFolder

    rng, count = np.random.default_rng(0), 1000
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "root"
        root.mkdir()
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
            coarse.resize((256, 256)).save(root / f"{i}.jpg", quality=90)

        def source(limit: int) -> ImageFolder:
            return ImageFolder(str(root), 64, cache=temporary, memory_limit_mb=limit)

        start = time.perf_counter()
        source(2048).prepare()
        first = time.perf_counter() - start
        start = time.perf_counter()
        held = source(2048)
        held.prepare()
        second = time.perf_counter() - start
        return {
            "first start: decode and index": count / first,
            "second start: index and pixels from the cache": count / second,
            "training, held in memory": images_per_second(
                iter(ImageDataModule(held, BATCH, seed=0).train_dataloader())
            ),
            "training, decoded at every use, 0 workers": images_per_second(
                iter(ImageDataModule(source(0), BATCH, seed=0).train_dataloader())
            ),
            "training, decoded at every use, 2 workers": images_per_second(
                iter(ImageDataModule(source(0), BATCH, seed=0, workers=2).train_dataloader())
            ),
        }


def main() -> None:
    console = Console()
    table = Table(title=f"images/s, batch {BATCH}, {torch.get_num_threads()} thread(s)")
    table.add_column("")
    table.add_column("", justify="right")
    for title in SHAPES:
        table.add_column(title, justify="right")
    columns = {}
    for title, (n, channels, size) in SHAPES.items():
        pixels = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)
        columns[title] = {}
        for name, batches in rows(pixels).items():
            with console.status(f"{title}: {name}"):
                columns[title][name] = images_per_second(batches())
    base = next(iter(next(iter(columns.values()))))
    for name in next(iter(columns.values())):
        factor = " / ".join(f"{column[name] / column[base]:.1f}x" for column in columns.values())
        table.add_row(name, factor, *(f"{column[name]:,.0f}" for column in columns.values()))
    console.print(table)

    table = Table("", "images/s", title="folder of 1,000 JPEGs, 256x256 to 64x64")
    with console.status("folder of JPEGs"):
        for name, rate in folder_rows().items():
            table.add_row(name, f"{rate:,.0f}")
    console.print(table)


if __name__ == "__main__":
    main()

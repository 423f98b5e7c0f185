"""Images per second of the training stream, compared with torchvision and a DataLoader.

    OMP_NUM_THREADS=1 python -m benchmarks.data

All rows read the same random pixels, in shuffled order, with horizontal flips.
Needs an idle machine: a busy core slows only the rows with workers, which favours this project's rows without.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

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
SECONDS = 1.0
ROUNDS = 5
SHAPES = {"28x28x1": (20_000, 1, 28), "32x32x3": (20_000, 3, 32)}


class Given(ImageSource):
    """A source of pixels in memory."""

    name = "given"

    def __init__(self, pixels: torch.Tensor):
        super().__init__(pixels.shape[-1], pixels.shape[1], 10, True)
        self.pixels = pixels

    def _load(self, split):
        return InMemoryImages(self.pixels, torch.arange(len(self.pixels)) % 10)


class Torchvision(Dataset):
    """The work of torchvision's MNIST and CIFAR10 for each item: array row, PIL image, transforms."""

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
    """Measured over `SECONDS`, after 8 batches, which workers may have prefetched."""
    for _ in range(8):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        count += len(next(batches)[0])
    return count / (time.perf_counter() - start)


def measure(rows: dict[str, Callable[[], Iterator]]) -> dict[str, list[float]]:
    """Each row `ROUNDS` times, interleaved, so that other load affects all rows alike."""
    rates = {name: [] for name in rows}
    for _ in range(ROUNDS):
        for name, batches in rows.items():
            rates[name].append(images_per_second(batches()))
    return rates


def shown(rates: list[float]) -> str:
    return f"{median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


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


def folder() -> dict[str, list[float]]:
    """Images per second of a folder of 256x256 JPEGs scaled to 64x64."""
    from src.data.image_folder import ImageFolder

    rng, count = np.random.default_rng(0), 1000
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "root"
        root.mkdir()
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
            coarse.resize((256, 256)).save(root / f"{i}.jpg", quality=90)

        def source(cache: str, limit: int) -> ImageFolder:
            return ImageFolder(str(root), 64, cache=f"{temporary}/{cache}", memory_limit_mb=limit)

        def start(cache: str) -> float:
            begin = time.perf_counter()
            source(cache, 2048).prepare()
            return count / (time.perf_counter() - begin)

        def training(limit: int, workers: int) -> Callable[[], Iterator]:
            data = ImageDataModule(source("0", limit), BATCH, seed=0, workers=workers)
            return lambda: iter(data.train_dataloader())

        starts = {
            "first start: decode and index": [start(str(k)) for k in range(ROUNDS)],
            "second start: index and pixels from the cache": [start(str(k)) for k in range(ROUNDS)],
        }
        return starts | measure(
            {
                "training, held in memory": training(2048, 0),
                "training, decoded at every use, 0 workers": training(0, 0),
                "training, decoded at every use, 2 workers": training(0, 2),
            }
        )


def main() -> None:
    console = Console(width=120)
    conditions = f"batch {BATCH}, {torch.get_num_threads()} thread(s), median of {ROUNDS} (lowest to highest)"
    console.print(f"load before the start: {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores")
    for title, (n, channels, size) in SHAPES.items():
        pixels = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)
        with console.status(title):
            rates = measure(rows(pixels))
        base = median(next(iter(rates.values())))
        table = Table("", "images/s", "", title=f"{title}: {conditions}")
        for name, values in rates.items():
            table.add_row(name, shown(values), f"{median(values) / base:.1f}x")
        console.print(table)
    with console.status("folder of JPEGs"):
        rates = folder()
    table = Table("", "images/s", title=f"1,000 JPEGs, 256x256 to 64x64: {conditions}")
    for name, values in rates.items():
        table.add_row(name, shown(values))
    console.print(table)


if __name__ == "__main__":
    main()

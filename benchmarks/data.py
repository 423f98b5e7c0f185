"""Images per second of the training stream, beside torchvision with the usual DataLoader.

    OMP_NUM_THREADS=1 python -m benchmarks.data [--parts memory jpegs pngs] [--json FILE]

All rows read the same random pixels, in shuffled order, with mirroring, into float32 batches in [-1, 1].
Run it on an idle machine: a busy core slows only the rows with workers, so the ratios would favour the training stream.
The part jpegs also compares streaming with the decoder's own rate in as many processes, and pngs times the starts on a
folder of 50,000 small PNGs.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.report import machine, spread, write_json
from src.data.codec import Pixels
from src.data.datamodule import ImageDataModule
from src.data.image_folder import ImageFolder
from src.data.image_index import ImageIndex
from src.data.source import ImageSource, InMemoryImages

BATCH = 128
SECONDS = 1.0
# Workers deliver whole batches of 128, so that a short time would count one more or less.
STREAMED_SECONDS = 4.0
ROUNDS = 5
SHAPES = {"28x28x1": (20_000, 1, 28), "32x32x3": (20_000, 3, 32)}


class Held(ImageSource):
    """A source of images that are in memory already."""

    name = "held"

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


def endless(loader: DataLoader) -> Iterator[torch.Tensor]:
    """The images of the loader's batches, pass after pass."""
    return (images for images, _ in itertools.chain.from_iterable(itertools.repeat(loader)))


def stream(source: ImageSource, workers: int) -> Iterator[torch.Tensor]:
    """The images of the training stream's batches, as the network sees them."""
    codec = Pixels(source.image_shape)
    data = ImageDataModule(source, BATCH, seed=0, workers=workers)
    return (codec.encode(batch.images) for batch in data.train_dataloader())


def images_per_second(batches: Iterator, seconds: float = SECONDS) -> float:
    """Over so many seconds, after more batches than workers prepare ahead."""
    for _ in range(8):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        count += len(next(batches))
    return count / (time.perf_counter() - start)


def measure(rows: dict[str, Callable[[], Iterator]]) -> dict[str, list[float]]:
    """Each row `ROUNDS` times, in turns, so that other load on the machine affects all rows alike."""
    rates = {name: [] for name in rows}
    for _ in range(ROUNDS):
        for name, batches in rows.items():
            rates[name].append(images_per_second(batches()))
    return rates


def shown(rates: list[float]) -> str:
    return f"{median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"


def rows(pixels: torch.Tensor) -> dict[str, Callable[[], Iterator]]:
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
        "training stream, 0 workers": lambda: stream(Held(pixels), 0),
        "training stream, 2 workers": lambda: stream(Held(pixels), 2),
    }


def decoded(index: ImageIndex, paths: list[str]) -> float:
    """Seconds of reading and decoding these images, in one process."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    for path in paths:
        index.decode(index.read(path))
    return time.perf_counter() - start


def decoder(source: ImageFolder, workers: int) -> float:
    """Images per second of reading and decoding alone, in so many processes."""
    images = source.split("train")
    paths = [entry.path for entry in images.entries]
    with ProcessPoolExecutor(workers, get_context("fork")) as pool:
        list(pool.map(decoded, [images.index] * workers, [paths[:10]] * workers))  # starts the processes
        seconds = list(
            pool.map(decoded, [images.index] * workers, [paths[k::workers] for k in range(workers)])
        )
    return len(paths) / max(seconds)


def folder() -> dict[str, list[float]]:
    """Images per second of a folder of 256x256 JPEGs scaled to 64x64."""
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
            return lambda: stream(source("0", limit), workers)

        starts = {
            "first start: decode and index": [start(str(k)) for k in range(ROUNDS)],
            "second start: index and pixels from the cache": [start(str(k)) for k in range(ROUNDS)],
        }
        rates: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for workers in (1, 2):
                streamed = source("0", 0)
                streamed.prepare()
                rates.setdefault(f"decoder alone, {workers} processes", []).append(decoder(streamed, workers))
                rate = images_per_second(stream(streamed, workers), STREAMED_SECONDS)
                rates.setdefault(f"training, decoded at every use, {workers} workers", []).append(rate)
        return starts | rates | measure({"training, held in memory": training(2048, 0)})


def make_pngs(root: Path, count: int = 50_000) -> None:
    """Writes 32x32 PNGs of noise into folders of 1,000 each, unless they exist."""
    rng = np.random.default_rng(0)
    for k in range(count // 1000):
        part = root / f"{k:02}"
        if not part.exists():
            part.mkdir(parents=True)
            for i in range(1000):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(part / f"{i:03}.png")


def pngs(kept: Path | None) -> dict[str, list[float]]:
    """Seconds of starts on a folder of 50,000 PNGs, to the first batch; and of whole commands of one step."""
    with tempfile.TemporaryDirectory() as temporary:
        root = kept or Path(temporary) / "root"
        make_pngs(root)

        def start(limit: int) -> float:
            begin = time.perf_counter()
            source = ImageFolder(str(root), 32, cache=f"{temporary}/cache", memory_limit_mb=limit)
            source.prepare()
            next(stream(source, 0))
            return time.perf_counter() - begin

        def command() -> float:
            begin = time.perf_counter()
            options = ["data=image_folder", f"data.root={root}", "data.image_size=32", "trainer.max_steps=1"]
            options += [f"data.cache={temporary}/cache", "callbacks=none", "metrics=none", "logger=csv"]
            options += ["+trainer.limit_val_batches=0", f"hydra.run.dir={tempfile.mkdtemp(dir=temporary)}"]
            subprocess.run(
                [sys.executable, "-m", "src.train", *options], check=True, stdout=subprocess.DEVNULL
            )
            return time.perf_counter() - begin

        return {
            "first start: decode and index": [start(2048)],
            "second start, held in memory": [start(2048) for _ in range(ROUNDS)],
            "second start, decoded at every use": [start(0) for _ in range(ROUNDS)],
            "second start of src.train, the whole command of one step": [command() for _ in range(3)],
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("memory", "jpegs", "pngs")
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--folder", type=Path, help="where the 50,000 PNGs are made and kept")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    console = Console(width=120)
    conditions = f"batch {BATCH}, {torch.get_num_threads()} thread(s), median of {ROUNDS} (lowest to highest)"
    console.print(machine()["text"])
    found: dict[str, dict[str, list[float]]] = {}
    for title, (n, channels, size) in SHAPES.items() if "memory" in arguments.parts else ():
        pixels = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)
        with console.status(title):
            rates = found[title] = measure(rows(pixels))
        base = median(next(iter(rates.values())))
        table = Table("", "images/s", "", title=f"{title}: {conditions}")
        for name, values in rates.items():
            table.add_row(name, shown(values), f"{median(values) / base:.1f}x")
        console.print(table)
    if "jpegs" in arguments.parts:
        with console.status("folder of JPEGs"):
            rates = found["jpegs"] = folder()
        table = Table("", "images/s", title=f"1,000 JPEGs, 256x256 to 64x64: {conditions}")
        for name, values in rates.items():
            table.add_row(name, shown(values))
        console.print(table)
    if "pngs" in arguments.parts:
        with console.status("folder of PNGs"):
            times = found["pngs"] = pngs(arguments.folder)
        table = Table("", "seconds", "spread", title="50,000 PNGs, 32x32")
        for name, values in times.items():
            table.add_row(name, f"{median(values):.2f}", spread(values)["text"])
        console.print(table)
    write_json(arguments.json, found)


if __name__ == "__main__":
    main()

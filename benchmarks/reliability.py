"""The cost of keyed draws, finiteness checks and checkpoints, relative to a training step of unet_small.

    OMP_NUM_THREADS=1 python -m benchmarks.reliability

Each part is timed separately, interleaved with the step, and reported as a fraction of the step.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from src.app.options import CONF
from src.app.parts import denoiser_of
from src.data.stream import Batch
from src.diffusion.distance import Squared
from src.diffusion.loss import DenoisingLoss
from src.diffusion.time_sampling import Uniform
from src.diffusion.weighting import Simple
from src.randomness import draws_at, generator, key
from src.training.checkpoint import AtomicCheckpointIO
from src.training.module import DiffusionModule
from src.training.nonfinite import clip_or_skip

BATCH = 64
ROUNDS = 7
EVERY = 1000  # steps between two checkpoints, the default


def seconds(action: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        action()
    return (time.perf_counter() - began) / times


def main() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["data=fashion_mnist", "model=unet_small"])
    denoiser = denoiser_of(config)
    loss = DenoisingLoss(denoiser, Simple(), Uniform(), Squared())
    module = DiffusionModule(loss, torch.optim.Adam, None, None, seed=0, batch_size=BATCH)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-4)
    x0 = torch.rand(BATCH, 1, 28, 28) * 2 - 1
    positions = torch.arange(BATCH)

    def step() -> None:
        optimizer.zero_grad()
        module.training_step(Batch(x0, None, positions), 0)["loss"].backward()
        clip_or_skip(optimizer, module.loss.parameters(), 1.0)
        optimizer.step()

    def keyed() -> None:
        draws_at(positions, BATCH, module._times)
        draws_at(positions, BATCH, lambda k: module._noise(k, x0))
        torch.manual_seed(key(0, "dropout", 0))
        torch.rand(BATCH, generator=generator(0, "flip", 0))

    def unkeyed() -> None:
        torch.randint(1, 1001, (BATCH,))
        torch.randn_like(x0)
        torch.rand(BATCH)

    norm = torch.ones(())
    step()
    weights = denoiser.network.state_dict()
    content = {
        "global_step": 1,
        "ImageDataModule": {"samples": BATCH},
        "origin": {"world_size": 1, "data": ""},
        "state_dict": weights,
        "callbacks": {"EMA": {"weights": {name: weight.clone() for name, weight in weights.items()}}},
        "optimizer_states": [optimizer.state_dict()],
    }
    with tempfile.TemporaryDirectory() as folder:
        path, io = Path(folder) / "step_00000001.ckpt", AtomicCheckpointIO()
        parts = {
            "a step": (step, 3),
            "keyed draws": (keyed, 100),
            "the same draws without keys": (unkeyed, 100),
            "is the gradient finite": (lambda: bool(norm.isfinite()), 1000),
            "a checkpoint, checksum and flush": (lambda: io.save_checkpoint(content, path), 1),
        }
        measured: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(ROUNDS):
            for name, (action, times) in parts.items():
                measured[name].append(seconds(action, times))
        size = path.stat().st_size / 1e6
    cost = {name: median(values) for name, values in measured.items()}
    whole = cost["a step"]
    more = cost["keyed draws"] - cost["the same draws without keys"]
    saving = cost["a checkpoint, checksum and flush"] / EVERY
    table = Table(
        "part", "ms", "share of a step", title=f"unet_small, batch {BATCH}, {torch.get_num_threads()} threads"
    )
    for name, value in cost.items():
        table.add_row(name, f"{1e3 * value:.3f}", f"{value / whole:.2%}")
    table.add_row("keys alone", f"{1e3 * more:.3f}", f"{more / whole:.2%}")
    table.add_row(
        f"checkpoint of {size:.1f} MB every {EVERY} steps", f"{1e3 * saving:.3f}", f"{saving / whole:.2%}"
    )
    total = more + saving + cost["is the gradient finite"]
    table.add_row("all together", f"{1e3 * total:.3f}", f"{total / whole:.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()

"""The cost of keyed draws, of the check for finite gradients and of checkpoints, as shares of a training step.

    OMP_NUM_THREADS=1 python -m benchmarks.reliability

The network is unet_small. Each part is timed alone, in turns with the step: its share is what a step would save
without it.
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

from src.app import jobs
from src.app.conditions import conditioning_of
from src.app.options import CONF
from src.app.parts import codec_of, denoiser_of, loss_of, source_of
from src.conditioning import Condition
from src.data.stream import Batch
from src.randomness import draws_at, generator, key
from src.training.checkpoint import AtomicCheckpointIO
from src.training.module import DiffusionModule
from src.training.nonfinite import clip_or_skip

BATCH = 64
ROUNDS = 7
EVERY = 1000  # steps between two checkpoints, the default
Action = Callable[[], object]


def seconds(action: Action, times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        action()
    return (time.perf_counter() - began) / times


def module_of(*overrides: str) -> DiffusionModule:
    """The module of conf/train.yaml with these overrides, and Adam."""
    jobs.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", list(overrides))
    source = source_of(config)
    codec = codec_of(config, source)
    conditioning = conditioning_of(config, source, codec)
    loss = loss_of(config, denoiser_of(config, codec, conditioning))
    return DiffusionModule(loss, torch.optim.Adam, None, None, 0, BATCH, codec, conditioning)


def actions(module: DiffusionModule, path: Path) -> dict[str, tuple[Action, int]]:
    """What is timed, by name, and how often in a round; checkpoints are written to the path."""
    optimizer = torch.optim.Adam(module.loss.parameters(), lr=1e-4)
    images = torch.randint(0, 256, (BATCH, *module.codec.image_shape), dtype=torch.uint8)
    x0, positions = module.codec.encode(images), torch.arange(BATCH)

    def step() -> None:
        optimizer.zero_grad()
        module.training_step(Batch(images, Condition(), positions), 0)["loss"].backward()
        clip_or_skip(optimizer, module.loss.parameters(), 1.0)
        optimizer.step()

    def keyed() -> None:
        draws_at(positions, BATCH, lambda k: module.loss.draw(BATCH, generator(0, "time", k)))
        draws_at(positions, BATCH, lambda k: torch.randn(x0.shape, generator=generator(0, "noise", k)))
        torch.manual_seed(key(0, "dropout", 0))
        torch.rand(BATCH, generator=generator(0, "flip", 0))

    def unkeyed() -> None:
        module.loss.draw(BATCH, torch.default_generator)
        torch.randn_like(x0)
        torch.rand(BATCH)

    step()  # makes the optimiser's state
    weights = module.denoiser.network.state_dict()
    content = {
        "global_step": 1,
        "state_dict": weights,
        "callbacks": {"EMA": {"weights": {name: weight.clone() for name, weight in weights.items()}}},
        "optimizer_states": [optimizer.state_dict()],
    }
    norm = torch.ones(())
    return {
        "a step": (step, 3),
        "keyed draws": (keyed, 100),
        "the same draws without keys": (unkeyed, 100),
        "is the gradient finite": (lambda: bool(norm.isfinite()), 1000),
        "a checkpoint, checksum and flush": (lambda: AtomicCheckpointIO().save_checkpoint(content, path), 1),
    }


def main() -> None:
    module = module_of("data=fashion_mnist", "model=unet_small")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step_00000001.ckpt"
        parts = actions(module, path)
        measured: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(ROUNDS):
            for name, (action, times) in parts.items():
                measured[name].append(seconds(action, times))
        size = path.stat().st_size / 1e6
    cost = {name: median(values) for name, values in measured.items()}
    keys = cost["keyed draws"] - cost["the same draws without keys"]
    saving = cost["a checkpoint, checksum and flush"] / EVERY
    rows = cost | {
        "keys alone": keys,
        f"checkpoint of {size:.1f} MB every {EVERY} steps": saving,
        "all together": keys + saving + cost["is the gradient finite"],
    }
    title = f"unet_small, batch {BATCH}, {torch.get_num_threads()} threads"
    table = Table("part", "ms", "share of a step", title=title)
    for name, value in rows.items():
        table.add_row(name, f"{1e3 * value:.3f}", f"{value / cost['a step']:.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()

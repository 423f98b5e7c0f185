"""What the benchmarks share: the machine, spreads, and the JSON file."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from src.runs.machine import environment


def machine() -> dict[str, Any]:
    """The processor or GPU, threads, load and versions; `text` is one line."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    capabilities = torch.cpu.get_capabilities()
    instructions = [name for name in ("avx512_bf16", "amx_bf16") if capabilities.get(name)]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    load = os.getloadavg()[0]
    threads = torch.get_num_threads()
    where = " + ".join(gpus) or f"{model} ({', '.join(instructions) or 'no bfloat16 instructions'})"
    return {
        **environment(),
        "processor": model,
        "instructions": instructions,
        "threads": threads,
        "load": load,
        "text": f"{where}, {threads} thread(s), load {load:.1f} of {os.cpu_count()}, torch {torch.__version__}",
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest and highest value; `text` is the range."""
    low, high = min(values), max(values)
    return {
        "median": median(values),
        "low": low,
        "high": high,
        "n": len(values),
        "text": f"{low:.3g}-{high:.3g}",
    }


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    """Writes the results with the machine; does nothing without a path."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), **results}, indent=1), encoding="utf-8")

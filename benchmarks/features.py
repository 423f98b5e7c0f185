"""InceptionV3's features: images per second and deviation, beside torch-fidelity's own call.

    python -m benchmarks.features [--json out.json]

Random weights, images of 32x32x3. The deviation is that of the features, relative to their norm.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from benchmarks.report import machine, spread, write_json
from src.metrics.features import InceptionFeatures
from src.metrics.inception import empty_network


def random_weights(path: Path) -> None:
    """Writes random weights in torch-fidelity's format."""
    weights = {}
    for name, tensor in empty_network("2048").state_dict().items():
        if name.endswith("conv.weight"):
            weights[name] = torch.randn(tensor.shape) * (2 / tensor[0].numel()) ** 0.5
        elif name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
        elif name.endswith(("bn.weight", "running_var")):
            weights[name] = 0.5 + torch.rand(tensor.shape)
        else:
            weights[name] = 0.1 * torch.randn(tensor.shape)
    torch.save(weights, path)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        random_weights(path)
        theirs = FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(path))
        ours = {chunk: InceptionFeatures(str(path), chunk=chunk).to(device) for chunk in (None, 8, 64)}
    images = torch.randint(0, 256, (arguments.batch, 3, 32, 32), dtype=torch.uint8, device=device)
    theirs.to(device)

    @torch.no_grad()
    def fidelity() -> torch.Tensor:
        return theirs(images)[0]

    rows = {"torch-fidelity": fidelity, "ours": lambda: ours[None](images)}
    for chunk in (8, 64):
        if chunk <= arguments.batch:
            rows[f"ours, {chunk} at once"] = partial(ours[chunk], images)
    found = {name: run() for name, run in rows.items()}  # warms up
    speeds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(arguments.rounds):
        for name, run in rows.items():
            start = time.perf_counter()
            run().sum().item()
            speeds[name].append(arguments.batch / (time.perf_counter() - start))
    expected = found["torch-fidelity"]
    deviation = float((found["ours"] - expected).norm() / expected.norm())
    base = spread(speeds["torch-fidelity"])["median"]
    table = Table("", "images/s", "range", "of torch-fidelity", title=machine()["text"])
    for name, values in speeds.items():
        each = spread(values)
        table.add_row(name, f"{each['median']:.1f}", each["text"], f"{each['median'] / base:.2f}x")
    console = Console(width=120)
    console.print(table)
    console.print(f"deviation of the features: {deviation:.1e}")
    write_json(arguments.json, {"images_per_second": speeds, "deviation": deviation})


if __name__ == "__main__":
    main()

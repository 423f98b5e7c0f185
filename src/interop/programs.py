"""A network alone, as a program that is loaded without this framework: torch.export and ONNX."""

from pathlib import Path

import torch
from torch import Tensor, nn

from src.conditioning import Condition
from src.model import Network

PROGRAM, ONNX = "network.pt2", "network.onnx"
OPSET = 18


class Bare(nn.Module):
    """A network called with tensors only: (x, label) or (x, label, classes).

    Args:
        network: reads at most labels, and in training how an image was transformed, which is nothing in sampling.

    Raises:
        ValueError: it reads tokens or images, or the label of a second time.
    """

    def __init__(self, network: Network):
        super().__init__()
        if other := sorted(network.reads - {"labels", "augment"}):
            raise ValueError(
                f"conditioning: the network reads {', '.join(other)}, and only networks of labels are exported"
            )
        if network.second_time:  # without its label, the program would be the flow alone
            raise ValueError("model.second_time=true: networks with a second time are not exported")
        self.network = network

    def forward(self, x: Tensor, label: Tensor, classes: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B,), int64 (B,) with -1 for no class -> the network's output."""
        return self.network(x, label, None if classes is None else Condition(labels=classes))


def example(network: Network, batch: int = 2, labels: tuple[float, float] = (0, 1)) -> dict[str, Tensor]:
    """Inputs of `Bare` by name: noise, labels of the time, and classes where the network has them.

    Args:
        network: the network.
        batch: number of images.
        labels: the first and the last label; the others lie evenly between them.
    """
    draw = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(batch, *network.image_shape, generator=draw),
        "label": torch.linspace(*labels, batch),
    }
    if "labels" in network.reads:
        inputs["classes"] = torch.arange(batch) - 1
    return inputs


def exported(network: Network) -> torch.export.ExportedProgram:
    """The network's graph for batches of any size, weights included.

    Raises:
        ValueError: the network is conditioned on more than classes, or has a second time.
    """
    inputs = example(network)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(
            Bare(network).eval(), (), inputs, dynamic_shapes={name: {0: batch} for name in inputs}
        )


def write_program(network: Network, labels: tuple[float, float], folder: Path) -> float:
    """Writes <folder>/network.pt2.

    Args:
        network: the network.
        labels: range of the labels for which it is compared.
        folder: where the program is written.

    Returns:
        Its largest difference from the network, of the output's scale.
    """
    torch.export.save(exported(network), folder / PROGRAM)
    program = torch.export.load(folder / PROGRAM).module()
    return _difference(network, labels, lambda inputs: program(**inputs))


def write_onnx(network: Network, labels: tuple[float, float], folder: Path) -> float:
    """Writes <folder>/network.onnx, and compares it in onnxruntime; see `write_program`."""
    import onnxruntime

    path = folder / ONNX
    program = torch.onnx.export(
        exported(network), dynamo=True, opset_version=OPSET, external_data=False, verbose=False
    )
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = {each.name for each in session.get_inputs()}

    def run(inputs: dict[str, Tensor]) -> Tensor:
        given = {name: tensor.numpy() for name, tensor in inputs.items() if name in names}
        return torch.from_numpy(session.run(None, given)[0])

    return _difference(network, labels, run)


@torch.no_grad()
def _difference(network: Network, labels: tuple[float, float], run) -> float:
    """The largest difference for a batch of another size than that of the export."""
    inputs = example(network, 5, labels)
    expected = Bare(network)(**inputs)
    return ((run(inputs) - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()

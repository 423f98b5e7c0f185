"""InceptionV3 of the original TensorFlow graph (Inception-2015-12-05), the feature space of FID.

The network is torch-fidelity's `FeatureExtractorInceptionV3`; this module finds, reads and checks its weights.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from src.errors import UserError

if TYPE_CHECKING:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

POOL3_FILE = Path("~/.cache/diffusion-lab/inception-2015-12-05-pool3.safetensors")
"""File written by `make inception`: the weights up to the 2048 features, without the classifier head `fc`."""

LAYERS = {"64": 64, "192": 192, "768": 768, "2048": 2048, "logits_unbiased": 1008}
"""Names of the layers in torch-fidelity, and their numbers of features."""


def find_weights(weights: str | None, layer: str) -> Path:
    """Path of the weights: the given one, that of `make inception`, or torch-fidelity's, downloaded if missing.

    Args:
        weights: a path; None to search.
        layer: "logits_unbiased" skips the file of `make inception`, which does not contain the logits.

    Raises:
        UserError: the given file does not exist, or no file was found and the download failed.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    if weights is not None:
        path = expanded(Path(weights))
        if not path.is_file():
            raise UserError(
                f"metrics.features.weights={path}: no such file; leave it null and run `make inception`"
            )
        return path
    pool3 = expanded(POOL3_FILE)
    if layer != "logits_unbiased" and pool3.is_file():
        return pool3
    downloaded = expanded(Path(torch.hub.get_dir())) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    if not downloaded.is_file():
        try:
            downloaded.parent.mkdir(parents=True, exist_ok=True)
            # the file's name ends in the first digits of its SHA-256
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(downloaded), hash_prefix="6726825d")
        except (URLError, OSError, RuntimeError) as error:
            fix = (
                f"fetch {URL_INCEPTION_V3} to {downloaded} (no other file has the logits)"
                if layer == "logits_unbiased"
                else "run `make inception`, or choose metrics=none"
            )
            raise UserError(
                f"metrics.features.weights: no InceptionV3 weights in {pool3} or {downloaded}, "
                f"and the download failed ({error}): {fix}"
            ) from None
    return downloaded


def expanded(path: Path) -> Path:
    """The path with ~ replaced by the home folder.

    Raises:
        UserError: the home folder is unknown, e.g. if the user has no entry in the password file.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(
            f"metrics.features.weights: {path} is in an unknown home folder; set the environment variable HOME"
        ) from None


def read_weights(path: Path, option: str = "metrics.features.weights") -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file or a PyTorch state dict. Code in the file is not executed.

    Args:
        path: the file.
        option: the option that names it, for messages.

    Raises:
        UserError: the file is neither.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # the unpickler can raise any exception on arbitrary bytes
        raise UserError(f"{option}: {path} is neither a safetensors file nor a PyTorch state dict") from None
    if not isinstance(weights, Mapping) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise UserError(f"{option}: {path} is not a state dict of tensors")
    return dict(weights)


def empty_network(layer: str) -> "FeatureExtractorInceptionV3":
    """torch-fidelity's InceptionV3 on the meta device, without weights; draws no random numbers."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class WithoutLoading(FeatureExtractorInceptionV3):
        """Skips loading: the parent's constructor reads a file with the unsafe loader, so it gets an empty one."""

        def load_state_dict(self, state_dict, *args, **kwargs):
            if state_dict:
                return super().load_state_dict(state_dict, *args, **kwargs)

    file = io.BytesIO()
    torch.save({}, file)
    file.seek(0)
    with torch.device("meta"):
        return WithoutLoading("inception-v3-compat", [layer], feature_extractor_weights_path=file)


def build_network(weights: Mapping[str, Tensor], layer: str, origin: str) -> "FeatureExtractorInceptionV3":
    """torch-fidelity's InceptionV3 with these weights, returning the features of one layer.

    Args:
        weights: state dict; `fc` may be missing unless `layer` is "logits_unbiased".
        layer: one of `LAYERS`.
        origin: name of the weights for error messages.

    Raises:
        UserError: names or shapes are not InceptionV3's, or values are not finite.
    """
    weights = dict(weights)
    if "fc.weight" not in weights:
        if layer == "logits_unbiased":
            raise UserError(
                f"metrics.features.weights: {origin} ends before the logits (no fc), which the Inception Score "
                "needs; use torch-fidelity's file, or choose metrics=fid"
            )
        weights |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"metrics.features.weights: {origin} has values that are not finite")
    network = empty_network(layer)
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:2])[:200]
        raise UserError(
            f"metrics.features.weights: {origin} is not InceptionV3 of torch-fidelity ({reason})"
        ) from None
    return network.requires_grad_(False)


def fold_batch_norms(network: nn.Module) -> None:
    """Folds each batch norm into the preceding convolution and stores weights channels last.

    This is 1.5 times as fast on a CPU; features change by 1e-6 of their norm.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d

    for module in network.modules():
        if isinstance(module, BasicConv2d):
            module.conv = nn.utils.fusion.fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    network.to(memory_format=torch.channels_last)

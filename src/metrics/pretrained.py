"""The feature spaces of DINOv2 and CLIP, by torch-fidelity's extractors, with weights from a file or downloaded."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from hashlib import file_digest
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from src.errors import UserError
from src.metrics.features import FeatureExtractor, hash_tensors
from src.metrics.inception import expanded, read_weights

OPTION = "metrics.features.weights"


class PretrainedFeatures(FeatureExtractor):
    """A network of torch-fidelity, which resizes images as TensorFlow 1 does; grey images are repeated to RGB.

    Args:
        name: name of the feature space.
        network: torch-fidelity's extractor.
        origin: origin of the weights.
        chunk: largest number of images per network call.
    """

    def __init__(self, name: str, network: nn.Module, origin: str, chunk: int):
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        tensors = network.state_dict()
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise UserError(f"{OPTION}: {origin} has values that are not finite")
        with torch.no_grad():
            probe = network(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))[0]
        super().__init__(name, probe.shape[1], hash_tensors(tensors), origin)
        self.network = network.requires_grad_(False)
        self.chunk = chunk
        self.eval()

    def extract(self, images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise ValueError(
                f"images for the features {self.name!r} must have 1 or 3 channels, got {images.shape[1]}"
            )
        images = images.expand(-1, 3, -1, -1)
        return torch.cat([self.network(chunk)[0] for chunk in images.split(self.chunk)])


class DinoFeatures(PretrainedFeatures):
    """DINOv2's class token (Oquab et al. 2023), the space of FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675).

    The network's code is that of github.com/facebookresearch/dinov2, which torch.hub downloads once and keeps in its
    folder; nothing else of it is executed. With `vitl14`, used by FD-DINOv2, the space is called "dinov2", otherwise
    "dinov2_<network>".

    Args:
        network: size of the network.
        weights: a file of the published state dict (.pth or safetensors); None uses torch.hub's, downloaded if missing.
        chunk: largest number of images per network call.

    Raises:
        ValueError: chunk is below 1.
        UserError: code or weights are missing and cannot be downloaded, or do not fit.
    """

    def __init__(
        self,
        network: Literal["vits14", "vitb14", "vitl14", "vitg14"] = "vitl14",
        weights: str | None = None,
        chunk: int = 32,
    ):
        path = given(weights)
        hub = expanded(Path(torch.hub.get_dir()))
        try:
            with quiet():
                model = torch.hub.load(
                    "facebookresearch/dinov2", f"dinov2_{network}", pretrained=path is None, verbose=False
                )
        except Exception as error:  # the network's own code can raise any
            what = "code" if path else "code and weights"
            raise UserError(
                f"{OPTION}: DINOv2's {what} cannot be loaded ({first_line(error)}): put a clone of"
                f" github.com/facebookresearch/dinov2 into {hub}/facebookresearch_dinov2_main"
                + ("" if path else f", and give {OPTION}=<file of dinov2_{network}>")
            ) from None
        if path is not None:
            try:
                model.load_state_dict(read_weights(path))
            except RuntimeError as error:
                raise UserError(f"{OPTION}: {path} is not dinov2_{network} ({first_line(error)})") from None
        name = "dinov2" if network == "vitl14" else f"dinov2_{network}"
        file = path.name if path else "facebookresearch/dinov2"
        super().__init__(name, _dino_extractor(model), f"{file}: DINOv2 {network} in torch-fidelity", chunk)


def _dino_extractor(model: nn.Module) -> nn.Module:
    """torch-fidelity's extractor around a network; its own constructor takes no file of weights."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    class Around(FeatureExtractorDinoV2):
        def __init__(self):
            FeatureExtractorBase.__init__(self, "dinov2", ["dinov2"])
            self.feature_extractor_internal_dtype = torch.float32
            self.model = model

    return Around().float().eval()


class ClipFeatures(PretrainedFeatures):
    """CLIP's image embedding (Radford et al. 2021), before normalisation, as a feature space.

    With `vit-b-32` the space is called "clip", otherwise "clip_<network>".

    Args:
        network: name of the published network.
        weights: OpenAI's file, recognised by its hash, or a state dict with its names (.pth or safetensors). None uses
            torch-fidelity's copy of OpenAI's file, downloaded if missing.
        chunk: largest number of images per network call.

    Raises:
        ValueError: the network is unknown, or chunk is below 1.
        UserError: the weights are missing and cannot be downloaded, or do not fit.
    """

    def __init__(self, network: str = "vit-b-32", weights: str | None = None, chunk: int = 32):
        from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS

        key = f"clip-{network}"
        if key not in MODEL_METADATA:
            known = ", ".join(name.removeprefix("clip-") for name in MODEL_METADATA)
            raise ValueError(f"network={network!r}: choose one of {known}")
        digest = MODEL_METADATA[key]["hash"]
        path = given(weights)
        if path is None:
            path = expanded(Path(torch.hub.get_dir())) / "checkpoints" / f"{key}-{digest}.pt"
            if not path.is_file():
                _download(MODEL_URLS[key], path, digest)
        with path.open("rb") as file:
            published = file_digest(file, "sha256").hexdigest() == digest
        if published:
            with quiet():
                tensors = dict(torch.jit.load(path, map_location="cpu").state_dict())
        else:  # an unknown TorchScript file is not opened
            tensors = read_weights(path)
        name = "clip" if network == "vit-b-32" else f"clip_{network}"
        extractor = _clip_extractor(key, tensors, path)
        super().__init__(name, extractor, f"{path.name}: CLIP {network} in torch-fidelity", chunk)


def _download(url: str, path: Path, digest: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{OPTION}: there is no {path}, and the download of {url} failed ({first_line(error)}): give"
            f" {OPTION}=<file>"
        ) from None


def _clip_extractor(key: str, tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """torch-fidelity's extractor with these tensors, which its own constructor reads from TorchScript only."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP, build_model

    class Around(FeatureExtractorCLIP):
        def __init__(self):
            FeatureExtractorBase.__init__(self, key, ["clip"])
            self.feature_extractor_internal_dtype = torch.float32
            self.model = build_model(dict(tensors), torch.float32)
            self.resolution = self.model.visual.input_resolution

    try:
        return Around().eval()
    except (KeyError, IndexError, RuntimeError, AssertionError, ValueError, ArithmeticError) as error:
        raise UserError(f"{OPTION}: {path} is not {key} ({first_line(error)})") from None


def given(weights: str | None) -> Path | None:
    """The path of given weights.

    Raises:
        UserError: there is no such file.
    """
    if weights is None:
        return None
    path = expanded(Path(weights))
    if not path.is_file():
        raise UserError(
            f"{OPTION}={path}: no such file; give the file of the weights, or null to download it"
        )
    return path


def first_line(error: Exception) -> str:
    """The beginning of an error's message, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, warnings are dropped, and what foreign code prints goes to stderr, as the progress of downloads."""
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield

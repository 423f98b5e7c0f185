"""Feature spaces for comparing sets of images: fixed networks, identified by the hash of their weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.metrics.classifier import load_classifier
from src.metrics.inception import LAYERS, build_network, find_weights, fold_batch_norms, read_weights

WEIGHTS_FOLDER = Path(__file__).parent / "weights"


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, hexadecimal, over names, dtypes, shapes and bytes of the tensors, independent of the file format."""
    digest = sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def full_precision() -> Iterator[None]:
    """Runs convolutions in full float32 on the GPU: cuDNN's default, TF32, changes features by about 1e-3."""
    cudnn = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):  # before torch 2.9
        with cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
        return
    # `cudnn.flags` raises an error if the precision was set through torch 2.9's interface
    before = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        cudnn.conv.fp32_precision = before


class FeatureExtractor(nn.Module):
    """A fixed map from images to feature vectors.

    `forward` takes uint8 images (B, C, H, W) and returns float32 features (B, num_features). It always runs in
    evaluation mode, without gradients, and in full float32, whatever the training's precision.

    Attributes:
        name: name of the feature space; part of the scores' names.
        num_features: length of a feature vector.
        sha256: hash of the weights, see `hash_tensors`. Extractors with equal name and sha256 have the same space.
        origin: origin of the weights, for the protocol.
        base: name and sha256 of another space from whose features `from_base` gives these; None without one.
    """

    base: tuple[str, str] | None = None

    def __init__(self, name: str, num_features: int, sha256: str, origin: str):
        super().__init__()
        self.name = name
        self.num_features = num_features
        self.sha256 = sha256
        self.origin = origin

    def extract(self, images: Tensor) -> Tensor:
        """Features (B, num_features) of uint8 images (B, C, H, W); implemented by subclasses.

        Raises:
            ValueError: the images have an unsupported shape.
        """
        raise NotImplementedError

    def from_base(self, features: Tensor) -> Tensor:
        """The features (B, num_features), from those of `base`, so that one pass through a network gives both."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """A description of the feature space, for the protocol."""
        return {
            "name": self.name,
            "num_features": self.num_features,
            "sha256": self.sha256,
            "origin": self.origin,
        }

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"images for the features {self.name!r} must be uint8 (B, C, H, W), "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        with (
            torch.no_grad(),
            torch.autocast(images.device.type, enabled=False),
            full_precision(),
        ):
            return self.extract(images).float()

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Ignores `mode` and stays in evaluation mode."""
        return super().train(False)


class ClassifierFeatures(FeatureExtractor):
    """Penultimate features of a small classifier trained by `python -m src.train_classifier`.

    Args:
        weights: name of a classifier that comes with this project ("digits", "fashion_mnist"), or the path of
            a safetensors file written by `src.train_classifier`.

    Raises:
        UserError: the file does not exist, or is not such a file.
    """

    def __init__(self, weights: str):
        path = Path(weights) if Path(weights).suffix else WEIGHTS_FOLDER / f"{weights}.safetensors"
        classifier, metadata = load_classifier(path)
        architecture = classifier.architecture
        super().__init__(
            name=path.stem,
            num_features=architecture["num_features"],
            sha256=hash_tensors(classifier.state_dict()),
            origin=(
                f"{path.name}: classifier of {metadata.get('data', 'unknown data')}, test accuracy "
                f"{metadata.get('test_accuracy', 'unknown')}, made by {metadata.get('command', 'unknown')}"
            ),
        )
        self.image_shape = (architecture["channels"], architecture["image_size"], architecture["image_size"])
        self.classifier = classifier.requires_grad_(False)
        self.eval()

    def extract(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"images for the features {self.name!r} must have shape {self.image_shape}, "
                f"got {tuple(images.shape[1:])}: choose metrics=fid, or train a classifier on this data set"
            )
        return self.classifier.features(images)

    def logits(self, features: Tensor) -> Tensor:
        """The classifier's logits (B, num_classes), from features (B, num_features)."""
        return self.classifier.head(features)


class InceptionFeatures(FeatureExtractor):
    """InceptionV3 of the original TensorFlow graph, as used by FID (Heusel et al. 2017).

    The network is torch-fidelity's. It resizes images of any height and width to 299 x 299 as TensorFlow 1 does:
    bilinear, without antialiasing, ignoring the aspect ratio. Grey images are repeated to RGB.

    Args:
        weights: path of the weights (safetensors or a PyTorch state dict). None uses the file that `make inception`
            writes if it exists, otherwise torch-fidelity's file, which is downloaded if it is missing.
        layer: torch-fidelity's name of the layer. With "2048", used by FID, the feature space is called "inception",
            otherwise "inception_<layer>". "logits_unbiased" is for the Inception Score.
        chunk: largest number of images per network call. None takes 16 on a CPU, whose caches hold the activations
            of so many (docs/performance.md), otherwise 64.

    Raises:
        ValueError: the layer is unknown, or chunk is below 1.
        UserError: the weights are missing, or are not InceptionV3's.
    """

    def __init__(self, weights: str | None = None, layer: str = "2048", chunk: int | None = None):
        layer = str(layer)
        if layer not in LAYERS:
            raise ValueError(f"layer={layer!r}: choose one of {', '.join(LAYERS)}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        path = find_weights(weights, layer)
        tensors = read_weights(path)
        network = build_network(tensors, layer, str(path))
        everything = network.state_dict().items()
        used = {name: tensor for name, tensor in everything if not name.endswith("num_batches_tracked")}
        body = {name: tensor for name, tensor in used.items() if not name.startswith("fc.")}
        if layer == "logits_unbiased":
            base = ("inception", hash_tensors(body))
        else:
            used, base = body, None
        super().__init__(
            name="inception" if layer == "2048" else f"inception_{layer}",
            num_features=LAYERS[layer],
            sha256=hash_tensors(used),
            origin=f"{path.name}: InceptionV3 of TensorFlow's graph of 2015-12-05 in torch-fidelity",
        )
        fold_batch_norms(network)
        self.base = base
        self.network = network
        self.chunk = chunk
        self.eval()

    def extract(self, images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"images for InceptionV3 must have 1 or 3 channels, got {images.shape[1]}")
        images = images.expand(-1, 3, -1, -1)
        size = self.chunk or (16 if images.device.type == "cpu" else 64)
        return torch.cat([self.network(chunk)[0] for chunk in images.split(size)])

    def from_base(self, features: Tensor) -> Tensor:
        """The logits, from the 2048 features."""
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            return features @ self.network.fc.weight.T

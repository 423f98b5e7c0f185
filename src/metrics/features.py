"""Feature spaces in which sets of images are compared: fixed networks, identified by their weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from src.metrics.classifier import load_classifier
from src.metrics.inception import LAYERS, build_network, find_weights, fold_batch_norms, read_weights

WEIGHTS_FOLDER = Path(__file__).parent / "weights"


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of the tensors: independent of the file that held them."""
    digest = sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions in full float32 on the GPU: cuDNN's default, TF32, moves features by about 1e-3."""
    cudnn = torch.backends.cudnn
    if not hasattr(cudnn, "conv"):  # before torch 2.9
        with cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
        return
    # not `cudnn.flags`, which raises where the precision was set through the interface of torch 2.9
    before = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        cudnn.conv.fp32_precision = before


class FeatureExtractor(nn.Module):
    """A fixed map from images to feature vectors.

    `forward` takes uint8 images (B, C, H, W) and returns float32 features (B, num_features). It is always in
    evaluation mode, without gradients, in full float32 whatever precision the training runs in.

    Attributes:
        name: name of the feature space; part of every score's name.
        num_features: length of a feature vector.
        sha256: hash of the weights, see `hash_weights`.
        origin: where the weights come from, in words, for the protocol.
    """

    def __init__(self, name: str, num_features: int, sha256: str, origin: str):
        super().__init__()
        self.name = name
        self.num_features = num_features
        self.sha256 = sha256
        self.origin = origin

    def extract(self, images: Tensor) -> Tensor:
        """Features (B, num_features) of checked images (B, C, H, W), uint8; subclasses write this one."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"features of {self.name!r} are of uint8 images (B, C, H, W), "
                f"not {images.dtype} {tuple(images.shape)}"
            )
        with (
            torch.no_grad(),
            torch.autocast(images.device.type, enabled=False),
            full_precision(),
        ):
            return self.extract(images).float()

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stay in evaluation mode."""
        return super().train(False)


class ClassifierFeatures(FeatureExtractor):
    """Penultimate features of a small classifier trained by `python -m src.train_classifier`.

    Args:
        weights: name of a classifier that comes with this project ("digits", "fashion_mnist"), or the path of
            a safetensors file that `src.train_classifier` wrote.

    Raises:
        UserError: no such file, or another kind of file.
    """

    def __init__(self, weights: str):
        path = Path(weights) if Path(weights).suffix else WEIGHTS_FOLDER / f"{weights}.safetensors"
        classifier, metadata = load_classifier(path)
        architecture = classifier.architecture
        super().__init__(
            name=path.stem,
            num_features=architecture["num_features"],
            sha256=hash_weights(classifier.state_dict()),
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
                f"features of {self.name!r} are of images {self.image_shape}, not {tuple(images.shape[1:])}: "
                "choose metrics=fid, or train a classifier of this data set"
            )
        return self.classifier.features(images)


class InceptionFeatures(FeatureExtractor):
    """InceptionV3 of the original TensorFlow graph, as FID uses it (Heusel et al. 2017).

    The network is torch-fidelity's. Images are resized to 299 x 299 as TensorFlow 1 did, without antialias;
    grey images are repeated into RGB.

    Args:
        weights: path of the weights (safetensors or a PyTorch state dict). None looks for the file that
            `make inception` makes, then for torch-fidelity's own, which is downloaded if need be.
        layer: torch-fidelity's name of the layer. "2048" is FID's; the space is then called "inception", and
            "inception_<layer>" otherwise. "logits_unbiased" is for the Inception Score.
        chunk: images in the network at once.

    Raises:
        ValueError: no such layer.
        UserError: no weights, or a file that is not what it says.
    """

    def __init__(self, weights: str | None = None, layer: str = "2048", chunk: int = 64):
        layer = str(layer)
        if layer not in LAYERS:
            raise ValueError(f"layer={layer!r}: choose one of {', '.join(LAYERS)}")
        path = find_weights(weights, layer)
        tensors = read_weights(path)
        network = build_network(tensors, layer, str(path))
        used = {
            name: tensor
            for name, tensor in network.state_dict().items()
            if not name.endswith("num_batches_tracked")
            and (layer == "logits_unbiased" or not name.startswith("fc."))
        }
        super().__init__(
            name="inception" if layer == "2048" else f"inception_{layer}",
            num_features=LAYERS[layer],
            sha256=hash_weights(used),
            origin=f"{path.name}: InceptionV3 of TensorFlow's graph of 2015-12-05 in torch-fidelity",
        )
        fold_batch_norms(network)
        self.network = network
        self.chunk = chunk
        self.eval()

    def extract(self, images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"Inception takes images of 1 or 3 channels, not {images.shape[1]}")
        images = images.expand(-1, 3, -1, -1)
        return torch.cat([self.network(chunk)[0] for chunk in images.split(self.chunk)])

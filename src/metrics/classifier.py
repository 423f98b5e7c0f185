"""A small classifier whose penultimate layer is a feature space for data unlike ImageNet, such as digits."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from src.errors import UserError


class SmallClassifier(nn.Module):
    """Convolutions with 2x2 max-pooling, one convolution over the whole remaining map, and a linear head.

    Because the last convolution covers the whole map, its `num_features` outputs depend on positions, unlike with
    global average pooling. All layers up to the features are convolutions, so that `full_precision` applies to them.

    Args:
        channels: image channels.
        image_size: height and width of the images, in pixels.
        widths: channels of the convolutions; each is followed by batch norm, SiLU and pooling.
        num_features: size of the penultimate layer.
        num_classes: number of logits.

    Raises:
        ValueError: the image size does not allow one pooling per width.
    """

    def __init__(
        self, channels: int, image_size: int, widths: list[int], num_features: int, num_classes: int
    ):
        super().__init__()
        self.architecture = {
            "channels": channels,
            "image_size": image_size,
            "widths": list(widths),
            "num_features": num_features,
            "num_classes": num_classes,
        }
        layers: list[nn.Module] = []
        size, previous = image_size, channels
        for width in widths:
            layers += [
                nn.Conv2d(previous, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.SiLU(),
                nn.MaxPool2d(2),
            ]
            previous, size = width, size // 2
        if size < 1:
            raise ValueError(
                f"widths: {len(widths)} poolings reduce {image_size} pixels to 0; give fewer widths"
            )
        layers += [
            nn.Conv2d(previous, num_features, size, bias=False),
            nn.BatchNorm2d(num_features),
            nn.SiLU(),
            nn.Flatten(),
        ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features (B, num_features) of uint8 images (B, channels, image_size, image_size)."""
        return self.body(images.float() / 127.5 - 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of uint8 images (B, channels, image_size, image_size)."""
        return self.head(self.features(images))


def save_classifier(classifier: SmallClassifier, path: Path, metadata: dict[str, str]) -> None:
    """Writes weights, architecture and `metadata` (data set, accuracy, command) to one safetensors file.

    Raises:
        SafetensorError: the file cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    save_file(tensors, path, {**metadata, "architecture": json.dumps(classifier.architecture)})


def load_classifier(path: Path) -> tuple[SmallClassifier, dict[str, str]]:
    """Loads the classifier in `path` and its metadata.

    Raises:
        UserError: the file is missing, or was not written by `save_classifier`.
    """
    try:
        if not path.is_file():  # reading a pipe never ends
            raise FileNotFoundError
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        # on the meta device, so that the initialisation does not change the random state
        with torch.device("meta"):
            classifier = SmallClassifier(**json.loads(metadata["architecture"]))
        classifier.load_state_dict(tensors, assign=True)
    except FileNotFoundError:
        raise UserError(
            f"metrics.features.weights: no file {path}; train it with python -m src.train_classifier"
        ) from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"metrics.features.weights: {path} is not a classifier written by src.train_classifier ({reason})"
        ) from None
    return classifier, metadata

"""Alignment of hidden activations with the features of a frozen encoder."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.errors import UserError
from src.metrics.features import hash_tensors
from src.metrics.inception import expanded, read_weights
from src.model import Network
from src.training.regularizer import Regularizer

OPTION = "regularizer.weights"


class TimmEncoder:
    """A frozen network of the package timm. It is not a module, so that it is neither trained nor saved.

    Images are resized and normalised as the network's data configuration in timm says, without its crop; grey images
    are repeated to RGB.

    Args:
        model: name in timm, e.g. "vit_base_patch14_dinov2.lvd142m".
        weights: a file of timm's weights of this network (safetensors, or a PyTorch state dict).

    Attributes:
        channels: channels of the features.
        identity: the name and a hash of the weights.

    Raises:
        ValueError: timm has no such network, or it gives no map of features.
        UserError: timm is not installed, or the file is missing or of another network.
    """

    def __init__(self, model: str, weights: str):
        if find_spec("timm") is None:
            raise UserError("regularizer=repa needs the package timm: pip install -e '.[repa]'")
        import timm

        path = expanded(Path(weights))
        if not path.is_file():
            raise UserError(
                f"{OPTION}={path}: no such file; give the weights of {model}, which are model.safetensors of"
                f" timm/{model} on the Hugging Face hub"
            )
        if not timm.is_model(model):  # other names may mean a download
            raise ValueError(f"model={model!r}: timm has no such network; see timm.list_models()")
        try:
            self.network = timm.create_model(model, num_classes=0).eval().requires_grad_(False)
        except RuntimeError as error:
            raise ValueError(f"model={model!r}: {str(error).splitlines()[0]}") from None
        if not hasattr(self.network, "forward_intermediates"):
            raise ValueError(
                f"model={model!r} gives no map of features; choose another, e.g. a vision transformer"
            )
        self._load(read_weights(path, OPTION), f"{OPTION}={path}: these are not the weights of {model}")
        self.settings = timm.data.resolve_model_data_config(self.network)
        self.identity = f"{model} with weights {hash_tensors(self.network.state_dict())[:16]}"
        self.channels = self(torch.zeros(1, 3, 8, 8)).shape[1]

    def _load(self, tensors: dict[str, Tensor], wrong: str) -> None:
        try:
            missing = self.network.load_state_dict(
                tensors, strict=False
            ).missing_keys  # others are the classifier's
        except RuntimeError as error:
            missing = [str(error).splitlines()[1].strip()[:200]]
        if missing:
            raise UserError(f"{wrong} ({missing[0]})")
        if not all(tensor.isfinite().all() for tensor in self.network.state_dict().values()):
            raise UserError(f"{wrong}: they are not finite")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The last map of features, float32, shape (B, channels, h, w).

        Args:
            images: in [-1, 1], 1 or 3 channels, shape (B, C, H, W).
        """
        if next(self.network.parameters()).device != images.device:
            self.network.to(images.device)
        settings = self.settings
        mode = "bilinear" if settings["interpolation"] == "bilinear" else "bicubic"
        images = (images.float() + 1) / 2
        images = F.interpolate(images, settings["input_size"][1:], mode=mode, antialias=True).clamp(0, 1)
        mean, std = (images.new_tensor(settings[name])[:, None, None] for name in ("mean", "std"))
        images = (images.expand(-1, 3, -1, -1) - mean) / std
        (features,) = self.network.forward_intermediates(
            images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return features.float()


class REPA(Regularizer):
    """Representation alignment (Yu et al. 2024, arXiv:2410.06940, eq. 8).

        -weight mean_{i,n} cos(projector(h_{i,n}), y_{i,n})

    h_{i,n} is the layer's output for patch n of the noisy image i, and y_{i,n} the feature of the clean image at this
    place. Features are interpolated to the layer's grid. The projector is a perceptron of three layers, which is
    trained with the network, stored in checkpoints, and not used afterwards.

    Args:
        network, image_shape, layer: see `Regularizer`; the default layer is that after a third of the blocks of a
            transformer, at most 8 (the paper's is 8 of 24 or 28).
        model, weights: see `TimmEncoder`. A training that is continued needs the same weights.
        weight: 0.5 in the paper.
        width: of the projector; 2048 in the paper.

    Raises:
        ValueError: an argument is out of range, the images have neither 1 nor 3 channels, or the layer's output is no
            map or sequence of patches.
        UserError: see `TimmEncoder`.
    """

    def __init__(
        self,
        network: Network,
        image_shape: Sequence[int],
        model: str,
        weights: str | None = None,
        weight: float = 0.5,
        width: int = 2048,
        layer: str | None = None,
    ):
        super().__init__(network, image_shape, weight, layer)
        if weights is None:
            raise ValueError(f"weights=null: give the file of timm's weights of {model}, {OPTION}=<file>")
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        if image_shape[0] not in (1, 3):
            raise ValueError(
                f"model={model!r} reads images of 1 or 3 channels, and these have {image_shape[0]}"
            )
        if len(self.hidden_shape) == 3:
            channels, *self.grid = self.hidden_shape
        elif len(self.hidden_shape) == 2 and hasattr(network, "grid"):
            channels, self.grid = self.hidden_shape[1], list(network.grid)
        else:
            raise ValueError(
                f"layer={self.layer!r}: its output is no map or sequence of patches; choose another"
            )
        self.encoder = TimmEncoder(model, weights)
        self.projector = nn.Sequential(
            nn.Linear(channels, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, self.encoder.channels),
        )

    @staticmethod
    def depth_of(blocks):
        return min(blocks // 3, 8)

    def term(self, hidden, x0):
        if hidden.dim() == 4:
            hidden = hidden.flatten(2).transpose(1, 2)
        patches = hidden[:, -self.grid[0] * self.grid[1] :]  # class tokens come first
        features = self.encoder(x0)
        if list(features.shape[2:]) != self.grid:
            features = F.interpolate(features, self.grid, mode="bilinear", antialias=True)
        weight = next(self.projector.parameters(), patches)
        projected = self.projector(patches.to(weight.dtype)).to(patches.dtype)
        targets = features.flatten(2).transpose(1, 2).to(patches.dtype)
        return -F.cosine_similarity(projected, targets, dim=2).mean()

    def get_extra_state(self) -> dict[str, Tensor]:
        # checkpoints hold tensors only
        return {"encoder": torch.tensor(list(self.encoder.identity.encode()), dtype=torch.uint8)}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        before = bytes(state["encoder"].tolist()).decode(errors="replace")
        if before != self.encoder.identity:
            raise UserError(
                f"{OPTION}: this training began with {before}, and this is {self.encoder.identity}; give the same file"
            )

"""Transformers for images: DiT and JiT."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.model.base import Network, height_and_width
from src.model.blocks import xavier, zero
from src.model.condition_embedding import ConditionEmbedding, class_rows
from src.model.sizes import check_patches
from src.model.transformer import (
    TransformerBlock,
    fixed_embedding,
    grid_positions,
    modulate,
    rotary_table,
    token_norm,
)

TIME_FEATURES = 256


class DiT(Network):
    """Diffusion transformer: patches are tokens, time and class condition each block by adaLN-zero.

    DiT (Peebles & Xie 2023, arXiv:2212.09748) with the default options; with patch_size=2, 4 channels, out_channels=8
    and 1,000 classes these are its small network (S/2, 33M). The other options are those of later transformers. JiT
    (Li & He 2025, arXiv:2511.13720) uses all of them, with large patches in pixels and x0-prediction. An untrained
    network returns zero.

    Args:
        image_size: side length of the images in pixels, or a pair [H, W].
        channels: channels of the images.
        out_channels: channels of the output; None for the images' channels.
        num_classes: number of classes; 0 for an unconditional network.
        patch_size: side length of a patch; must divide height and width.
        width: channels of a token; a multiple of `heads` and of 4.
        depth: number of blocks.
        heads: heads of the attention.
        mlp_ratio: channels of the feed-forward layers, in units of `width`.
        norm: "layer" or "rms".
        qk_norm: normalise queries and keys.
        rotary: rotate queries and keys by row and column, besides the fixed embedding of the positions.
        swiglu: SwiGLU feed-forward layers, of equal size.
        bottleneck: channels to which a patch is projected before it is projected to `width` (JiT); None for
            one projection.
        class_tokens: number of tokens of the class, added from block `class_tokens_from` on and removed at the end
            (JiT); only with classes.
        class_tokens_from: the first block that has these tokens, counted from 0.
        frequency_shift: of the time embedding: 1, or 0 as in the authors' code, see `sinusoidal_embedding`.
        second_time: also embed the label of a second time, initialised to zero.
        augment_channels: size of an augmentation that the network reads; 0 for none. Initialised to zero.
        checkpointing: recompute the activations of each block in the backward pass, to save memory.

    Raises:
        ValueError: the patches do not divide the image, the heads do not divide the width, or another argument is out
            of range.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        channels: int,
        *,
        out_channels: int | None = None,
        num_classes: int = 0,
        patch_size: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        norm: str = "layer",
        qk_norm: bool = False,
        rotary: bool = False,
        swiglu: bool = False,
        bottleneck: int | None = None,
        class_tokens: int = 0,
        class_tokens_from: int = 0,
        frequency_shift: int = 1,
        second_time: bool = False,
        augment_channels: int = 0,
        checkpointing: bool = False,
    ):
        super().__init__()
        size = height_and_width(image_size)
        check_patches(size, patch_size)
        _check(width, depth, heads, mlp_ratio, norm, rotary, bottleneck, class_tokens, class_tokens_from)
        self.image_shape = (channels, *size)
        self.out_channels = channels if out_channels is None else out_channels
        self.reads = frozenset(["labels"] * bool(num_classes) + ["augment"] * bool(augment_channels))
        self.num_classes, self.patch_size, self.checkpointing = num_classes, patch_size, checkpointing
        self.class_tokens_from, self.second_time = class_tokens_from, second_time

        self.grid = (size[0] // patch_size, size[1] // patch_size)
        positions = grid_positions(*self.grid)
        self.register_buffer("positions", fixed_embedding(positions, width), persistent=False)
        class_tokens = class_tokens if num_classes else 0
        table = None
        if rotary:  # the class tokens come first and are not rotated
            table = rotary_table(F.pad(positions, (0, 0, class_tokens, 0)), width // heads)
        self.register_buffer("rotary", table, persistent=False)

        first = width if bottleneck is None else bottleneck
        self.patches = nn.Conv2d(channels, first, patch_size, patch_size, bias=bottleneck is None)
        self.patch_projection = nn.Identity() if bottleneck is None else nn.Linear(bottleneck, width)
        self.embedding = ConditionEmbedding(TIME_FEATURES, width, num_classes, frequency_shift)
        tokens = nn.Parameter(torch.empty(class_tokens, width)) if class_tokens else None
        self.register_parameter("class_tokens", tokens)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, int(mlp_ratio * width), norm=norm, qk_norm=qk_norm, swiglu=swiglu)
            for _ in range(depth)
        )
        self.norm_out = token_norm(width, norm)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.linear_out = nn.Linear(width, patch_size**2 * self.out_channels)
        self._initialise()
        if second_time:
            self.embedding.add_second_time()
        self.embedding.add_augmentation(augment_channels)

    def _initialise(self) -> None:
        """Xavier for linear layers and patches, std 0.02 for embeddings, zero for modulations and the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                xavier(module)
        nn.init.xavier_uniform_(self.patches.weight.detach().flatten(1))
        if self.patches.bias is not None:
            nn.init.zeros_(self.patches.bias)
        embeddings = [
            self.embedding.time.linear1.weight,
            self.embedding.time.linear2.weight,
            self.class_tokens,
        ]
        embeddings += [] if self.embedding.classes is None else [self.embedding.classes.weight]
        for weight in embeddings:
            if weight is not None:
                nn.init.normal_(weight, std=0.02)
        for layer in (*(block.modulation for block in self.blocks), self.modulation_out, self.linear_out):
            zero(layer)

    def forward(self, x, label, condition=None, to_label=None):
        """See `Network`. Class labels of -1 (`NO_CLASS`) or num_classes mean "no class".

        Raises:
            ValueError: a condition or second time is given, but the network does not support it.
        """
        embedding = self.embedding(label, condition, to_label)
        active = F.silu(embedding)
        tokens = self.patch_projection(self.patches(x).flatten(2).transpose(1, 2)) + self.positions
        extra = 0
        for number, block in enumerate(self.blocks):
            if self.class_tokens is not None and number == self.class_tokens_from:
                extra = len(self.class_tokens)
                of_class = self.embedding.classes(class_rows(condition, self.num_classes, label))
                tokens = torch.cat((of_class[:, None] + self.class_tokens, tokens), dim=1)
            rotary = self.rotary
            if rotary is not None and self.class_tokens is not None:
                rotary = rotary[:, len(self.class_tokens) - extra :]
            tokens = self.run(block, tokens, active, rotary)
        shift, scale = self.modulation_out(active).chunk(2, dim=1)
        return self._images(self.linear_out(modulate(self.norm_out(tokens[:, extra:]), shift, scale)))

    def _images(self, tokens: Tensor) -> Tensor:
        """(B, N, patch_size^2 out_channels) -> (B, out_channels, H, W)."""
        rows, columns = self.grid
        patches = tokens.unflatten(2, (self.patch_size, self.patch_size, -1)).unflatten(1, (rows, columns))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _check(
    width: int,
    depth: int,
    heads: int,
    mlp_ratio: float,
    norm: str,
    rotary: bool,
    bottleneck: int | None,
    class_tokens: int,
    class_tokens_from: int,
) -> None:
    for name, value in (("width", width), ("depth", depth), ("heads", heads), ("mlp_ratio", mlp_ratio)):
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if width % heads:
        raise ValueError(f"heads={heads} does not divide width={width}: choose a divisor")
    if width % 4:
        raise ValueError(f"width={width} must be a multiple of 4")
    if rotary and (width // heads) % 4:
        raise ValueError(
            f"heads={heads}: with rotary=true, width / heads = {width // heads} must be a multiple of 4"
        )
    if norm not in ("layer", "rms"):
        raise ValueError(f"norm must be layer or rms, got {norm!r}")
    if bottleneck is not None and bottleneck < 1:
        raise ValueError(f"bottleneck must be positive or null, got {bottleneck}")
    if class_tokens < 0:
        raise ValueError(f"class_tokens must not be negative, got {class_tokens}")
    if not 0 <= class_tokens_from < depth:
        raise ValueError(
            f"class_tokens_from must be below depth={depth} and at least 0, got {class_tokens_from}"
        )

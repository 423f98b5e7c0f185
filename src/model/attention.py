"""Scaled dot-product attention."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(query key^T / sqrt(d)) value (Vaswani et al. 2017, eq. 1), by PyTorch's fused kernels.

    The fused kernels have no forward-mode derivative. Where one is needed (`torch.func.jvp`), the formula is computed
    step by step, which needs memory for N^2 weights per head.

    Args:
        query, key, value: shape (B, heads, N, d); keys and values may have another N.
        mask: the valid keys, bool, broadcast to (B, heads, N, N of the keys); at least one for each query.

    Returns:
        Shape (B, heads, N, d).
    """
    if _has_tangent(query) or _has_tangent(key) or _has_tangent(value):
        weights = (query * query.shape[-1] ** -0.5) @ key.mT
        if mask is not None:
            weights = weights.masked_fill(~mask, -torch.inf)
        return weights.softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None

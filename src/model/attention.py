"""Scaled dot-product attention."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

LARGEST_WEIGHTS = 2**26
"""Most attention weights, B heads N M, that are computed at once on the CPU: 256 MiB in float32."""


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(query key^T / sqrt(d)) value (Vaswani et al. 2017, eq. 1).

    On the CPU two matrix products are faster in training than PyTorch's fused kernel, mostly in the backward pass, but
    they keep the N M weights of each head. The fused kernel computes everything else, except where a forward-mode
    derivative is needed (`torch.func.jvp`), which it does not have.

    Args:
        query: shape (B, heads, N, d).
        key, value: shape (B, heads, M, d).
        mask: which keys are used, bool, broadcastable to (B, heads, N, M), at least one True in each row; or None.

    Returns:
        Shape (B, heads, N, d).
    """
    if _has_tangent(query) or _has_tangent(key) or _has_tangent(value) or _in_products(query, key):
        return _products(query, key, value, mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _in_products(query: Tensor, key: Tensor) -> bool:
    """Whether two matrix products are the faster way: in training on the CPU, while the weights are few."""
    weights = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    return query.device.type == "cpu" and torch.is_grad_enabled() and weights <= LARGEST_WEIGHTS


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    weights = (query * query.shape[-1] ** -0.5) @ key.mT
    if mask is not None:
        weights = weights.masked_fill(~mask, -torch.inf)
    return weights.softmax(dim=-1) @ value


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None

"""Scaled dot-product attention."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

LARGEST_WEIGHTS = 2**26
"""Most attention weights, B heads N M, that are kept for the backward pass on the CPU: 128 MiB in bfloat16."""


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(query key^T / sqrt(d)) value (Vaswani et al. 2017, eq. 1).

    By PyTorch's fused kernel, with two exceptions. It has no forward-mode derivative (`torch.func.jvp`). And on the CPU
    its bfloat16 backward pass is 1.2 to 6 times slower than two matrix products, which keep the N M weights of a head.

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
    """Whether two matrix products are the faster way: in bfloat16 training on the CPU, while the weights are few."""
    slow = query.device.type == "cpu" and query.dtype == torch.bfloat16 and torch.is_grad_enabled()
    return slow and query.shape[:3].numel() * key.shape[2] <= LARGEST_WEIGHTS


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    weights = (query * query.shape[-1] ** -0.5) @ key.mT
    if mask is not None:
        weights = weights.masked_fill(~mask, -torch.inf)
    return weights.softmax(dim=-1) @ value


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None

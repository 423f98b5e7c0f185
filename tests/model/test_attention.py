"""Attention as two matrix products, against PyTorch's fused kernel."""

import pytest
import torch
import torch.nn.functional as F

from src.model import attention
from src.model.attention import _products, attend


def inputs(dtype, heads=3, queries=10, keys=7, requires_grad=True):
    draw = torch.Generator().manual_seed(0)
    shapes = (2, heads, queries, 8), (2, heads, keys, 8), (2, heads, keys, 8)
    drawn = [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.requires_grad_(requires_grad) for x in drawn]


def with_gradients(function, parts):
    output = function(*parts)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return [output, *torch.autograd.grad((output * weights).sum(), parts)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.1)]
)
def test_products_equal_the_fused_kernel_with_gradients(dtype, rtol, masked):
    mask = torch.rand(2, 1, 1, 7, generator=torch.Generator().manual_seed(1)) < 0.5 if masked else None
    if masked:
        mask[..., 0] = True
    parts = inputs(dtype)
    found = with_gradients(lambda *p: _products(*p, mask), parts)
    expected = with_gradients(lambda *p: F.scaled_dot_product_attention(*p, attn_mask=mask), parts)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * float(other.abs().max()))


def test_products_are_used_in_bfloat16_training_on_the_cpu(monkeypatch):
    used = []
    monkeypatch.setattr(attention, "_products", lambda query, *_: used.append("products") or query)
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda query, *_, **__: used.append("fused") or query
    )
    parts = inputs(torch.bfloat16)
    attend(*parts)
    assert used == ["products"]
    attend(*inputs(torch.float32))
    attend(*(x.detach().to("meta") for x in parts))
    with torch.no_grad():
        attend(*parts)
    monkeypatch.setattr(attention, "LARGEST_WEIGHTS", 2 * 3 * 10 * 7 - 1)
    attend(*parts)
    assert used[1:] == ["fused"] * 4

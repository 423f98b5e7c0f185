"""DiT against diffusers, its positions and layers against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from src.conditioning import Condition
from src.model import DiT
from src.model.attention import attend
from src.model.transformer import FeedForward, TokenAttention, grid_positions, rotary_table, rotate
from tests.model.networks import small


def test_equals_the_transformer_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=3,
        out_channels=6,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
        norm_eps=1e-6,
    ).eval()
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.1)
    ours = DiT(8, 3, out_channels=6, num_classes=5, patch_size=2, width=32, depth=2, heads=2)
    ours.load_state_dict(from_diffusers(theirs.state_dict(), depth=2))
    x, label, labels = torch.randn(3, 3, 8, 8), torch.tensor([0.0, 17.0, 999.0]), torch.tensor([0, 3, 5])
    with torch.no_grad():
        expected = theirs(x, label, class_labels=labels).sample
        torch.testing.assert_close(ours(x, label, Condition(labels=labels)), expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.05


def test_equals_the_authors_jit():
    """As distributed in azula, which compiles its blocks."""
    plugin = pytest.importorskip("azula.plugins.jit._src.model")
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "depth": 2, "num_classes": 5}
    theirs = plugin.JiT(
        *(16, 4, 3),
        hidden_size=32,
        depth=2,
        num_heads=2,
        num_classes=5,
        bottleneck_dim=8,
        in_context_len=4,
        in_context_start=1,
    ).eval()
    for weight in theirs.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.1)
    modern = {"norm": "rms", "qk_norm": True, "rotary": True, "swiglu": True, "frequency_shift": 0}
    tokens = {"bottleneck": 8, "class_tokens": 4, "class_tokens_from": 1}
    ours = DiT(16, 3, **sizes, width=32, heads=2, **modern, **tokens).eval()
    ours.load_state_dict(from_jit(theirs.state_dict(), depth=2))
    x, label, labels = torch.randn(3, 3, 16, 16), torch.tensor([0.0, 0.3, 0.999]), torch.tensor([0, 3, 5])
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = theirs(x, label, labels)
        torch.testing.assert_close(ours(x, label, Condition(labels=labels)), expected, rtol=1e-5, atol=1e-5)
        assert expected.std() > 0.05


def from_jit(theirs, depth):
    """Renamed weights; their embedding of the time has cosines first."""
    names = {
        "patch_projection": "x_embedder.proj2",
        "embedding.time.linear1": "t_embedder.mlp.0",
        "embedding.time.linear2": "t_embedder.mlp.2",
        "modulation_out": "final_layer.adaLN_modulation.1",
        "linear_out": "final_layer.linear",
    }
    for i in range(depth):
        names |= {
            f"blocks.{i}.modulation": f"blocks.{i}.adaLN_modulation.1",
            f"blocks.{i}.attention.qkv": f"blocks.{i}.attn.qkv",
            f"blocks.{i}.attention.projection": f"blocks.{i}.attn.proj",
            f"blocks.{i}.feed_forward.linear_in": f"blocks.{i}.mlp.w12",
            f"blocks.{i}.feed_forward.linear_out": f"blocks.{i}.mlp.w3",
        }
    ours = {f"{o}.{kind}": theirs[f"{t}.{kind}"] for o, t in names.items() for kind in ("weight", "bias")}
    cosines, sines = ours["embedding.time.linear1.weight"].chunk(2, dim=1)
    ours["embedding.time.linear1.weight"] = torch.cat((sines, cosines), dim=1)
    ours["patch_projection.weight"] = ours["patch_projection.weight"].flatten(1)
    ours["patches.weight"] = theirs["x_embedder.proj1.weight"]
    ours["embedding.classes.weight"] = theirs["y_embedder.embedding_table.weight"]
    ours["class_tokens"] = theirs["in_context_posemb"][0]
    ours["norm_out.weight"] = theirs["final_layer.norm_final.weight"]
    for i in range(depth):
        for norm in ("norm1", "norm2"):
            ours[f"blocks.{i}.{norm}.weight"] = theirs[f"blocks.{i}.{norm}.weight"]
        for name, short in (("query", "q"), ("key", "k")):
            ours[f"blocks.{i}.attention.{name}_norm.weight"] = theirs[f"blocks.{i}.attn.{short}_norm.weight"]
    return ours


def from_diffusers(theirs, depth):
    """Renamed weights. Theirs embed the time in each block, with the same weights in published checkpoints."""
    embedding = "transformer_blocks.{}.norm1.emb."
    names = {
        "patches": "pos_embed.proj",
        "embedding.time.linear1": embedding.format(0) + "timestep_embedder.linear_1",
        "embedding.time.linear2": embedding.format(0) + "timestep_embedder.linear_2",
        "modulation_out": "proj_out_1",
        "linear_out": "proj_out_2",
    }
    for i in range(depth):
        block = f"transformer_blocks.{i}."
        names |= {
            f"blocks.{i}.modulation": block + "norm1.linear",
            f"blocks.{i}.attention.projection": block + "attn1.to_out.0",
            f"blocks.{i}.feed_forward.linear_in": block + "ff.net.0.proj",
            f"blocks.{i}.feed_forward.linear_out": block + "ff.net.2",
        }
    ours = {f"{o}.{kind}": theirs[f"{t}.{kind}"] for o, t in names.items() for kind in ("weight", "bias")}
    # they have cosines first
    cos, sin = ours["embedding.time.linear1.weight"].chunk(2, dim=1)
    ours["embedding.time.linear1.weight"] = torch.cat((sin, cos), dim=1)
    ours["embedding.classes.weight"] = theirs[embedding.format(0) + "class_embedder.embedding_table.weight"]
    for i in range(depth):
        for key in theirs:  # the blocks share one embedding, in our network
            if key.startswith(embedding.format(i)):
                theirs[key].copy_(theirs[key.replace(embedding.format(i), embedding.format(0))])
        for kind in ("weight", "bias"):
            parts = [theirs[f"transformer_blocks.{i}.attn1.to_{part}.{kind}"] for part in "qkv"]
            ours[f"blocks.{i}.attention.qkv.{kind}"] = torch.cat(parts)
    return ours


def test_positions_are_row_major():
    assert grid_positions(2, 3).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_rotation_by_the_formula():
    """Channel pairs as complex numbers, times exp(i angle): the first half rotates with the row, then the column."""
    positions = torch.tensor([[0.0, 0.0], [2.0, 5.0]])
    x = torch.randn(1, 1, 2, 8)
    z = torch.view_as_complex(x[0, 0, 1].view(4, 2))
    angles = torch.tensor([2.0, 2.0 / 100, 5.0, 5.0 / 100])
    expected = torch.view_as_real(z * torch.exp(1j * angles)).flatten()
    rotated = rotate(x, rotary_table(positions, 8))[0, 0]
    torch.testing.assert_close(rotated[1], expected)
    assert torch.equal(rotated[0], x[0, 0, 0])


def test_rotated_attention_depends_on_relative_positions_only():
    torch.manual_seed(0)
    attention = TokenAttention(32, 2, qk_norm=True)
    x, positions = torch.randn(2, 12, 32), grid_positions(3, 4)
    near, far = (
        attention(x, rotary_table(positions + torch.tensor(shift), 16)) for shift in ([0, 0], [7, 3])
    )
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)
    assert (near - attention(x, None)).abs().max() > 1e-3


def test_swiglu_by_the_formula():
    layer = FeedForward(6, 12, swiglu=True)
    x = torch.randn(2, 3, 6)
    gate, value = F.linear(x, layer.linear_in.weight, layer.linear_in.bias).split(8, dim=-1)
    expected = layer.linear_out(gate * torch.sigmoid(gate) * value)
    torch.testing.assert_close(layer(x), expected)


def test_attention_by_the_formula_with_and_without_a_derivative():
    query, key, value = torch.randn(3, 2, 3, 5, 8, dtype=torch.float64)
    weights = torch.softmax(query @ key.mT / math.sqrt(8), dim=-1)
    torch.testing.assert_close(attend(query, key, value), weights @ value)
    output, tangent = torch.func.jvp(lambda v: attend(query, key, v), (value,), (value,))
    torch.testing.assert_close(output, weights @ value)
    torch.testing.assert_close(tangent, weights @ value)


@torch.no_grad()
def test_class_tokens_have_an_effect_beyond_the_embedding():
    network = small("jit", num_classes=3)
    x, label, condition = torch.randn(2, 1, 8, 8), torch.ones(2), Condition(labels=torch.tensor([0, 1]))
    before = network(x, label, condition)
    network.class_tokens.add_(1.0)
    assert (network(x, label, condition) - before).abs().max() > 1e-3
    assert small("jit").class_tokens is None


@torch.no_grad()
def test_patches_are_put_back_where_they_were():
    """With one identity-like block, an image whose patches are encoded by their pixels comes back."""
    network = small("dit", trained=False, image_size=[4, 6], channels=2, width=32)
    tokens = F.unfold(x := torch.randn(3, 2, 4, 6), 2, stride=2).transpose(
        1, 2
    )  # channels, then rows and columns
    tokens = tokens.unflatten(2, (2, 4)).transpose(2, 3).flatten(2)
    assert torch.equal(network._images(tokens), x)

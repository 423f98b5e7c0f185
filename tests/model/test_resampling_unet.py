"""The blocks of ADM and DDPM++ against their formulas."""

import torch
import torch.nn.functional as F
from torch import nn

from src.model.levels import double, halve
from src.model.resampling_unet import PixelAttention, ResamplingBlock
from tests.model.networks import batch, small


def block(**options):
    torch.manual_seed(0)
    defaults = {"embedding_channels": 6, "scale_shift": True, "project": False, "skip_scale": 1.0}
    made = ResamplingBlock(8, 12, dropout=0.0, groups=4, **defaults | options)
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.3)
    return made


def test_adaptive_group_normalisation_by_the_formula():
    made, (x, embedding) = block(resample=halve), (torch.randn(2, 8, 4, 6), torch.randn(2, 6))
    scale, shift = made.embedding_projection(embedding).view(2, 2, 12, 1, 1).unbind(1)
    h = made.conv1(F.avg_pool2d(F.silu(made.norm1(x)), 2))
    h = made.conv2(F.silu(made.norm2(h) * (1 + scale) + shift))
    torch.testing.assert_close(made(x, embedding), h + made.shortcut(F.avg_pool2d(x, 2)))


def test_ddpmpp_by_the_formula():
    made = block(resample=double, scale_shift=False, skip_scale=0.5**0.5)
    x, embedding = torch.randn(2, 8, 3, 2), torch.randn(2, 6)
    large = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    h = made.conv1(F.silu(made.norm1(x)).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    h = made.conv2(F.silu(made.norm2(h + made.embedding_projection(embedding)[..., None, None])))
    torch.testing.assert_close(made(x, embedding), (h + made.shortcut(large)) / 2**0.5)


def test_heads_attend_separately():
    torch.manual_seed(0)
    attention = PixelAttention(8, 2, 4, 1.0)
    for weight in attention.parameters():
        nn.init.normal_(weight, std=0.5)
    x = torch.randn(2, 8, 3, 5)
    qkv = attention.qkv(attention.norm(x).flatten(2).mT)
    heads = []
    for i in range(2):
        query, key, value = (qkv[..., 8 * part + 4 * i : 8 * part + 4 * i + 4] for part in range(3))
        heads.append(torch.softmax(query @ key.mT / 2, dim=-1) @ value)
    expected = x + attention.projection(torch.cat(heads, dim=-1)).mT.reshape(x.shape)
    torch.testing.assert_close(attention(x), expected)


def test_attention_is_where_it_is_published():
    def sides(name):
        network, found = small(name), []
        for part in (network.encoder, network.middle, network.decoder):
            seen: list[int] = []
            for module in part.modules():
                if isinstance(module, PixelAttention):
                    module.register_forward_hook(
                        lambda m, a, output, seen=seen: seen.append(output.shape[-1])
                    )
            found.append(seen)
        network(*batch(1, 1, 8, 8))
        return found

    # every block of the level in ADM; in DDPM++ only the last of the decoder
    assert sides("adm") == [[4], [4], [4, 4]]
    assert sides("ddpmpp") == [[4], [4], [4]]

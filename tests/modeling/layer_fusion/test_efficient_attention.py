"""Efficient attention: its cost, its gate, padding, and the parts that must not mix."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fusion_costs import HIDDEN, count_weights
from fusion_tokens import random_tokens, trained
from torch.utils.flop_counter import FlopCounterMode

from vitweave.modeling.layer_fusion.efficient_attention import (
    EfficientAttentionFusion,
    LinearAttention,
    MultiScaleAttention,
)


def test_the_size_is_that_of_the_formula():
    assert count_weights("efficient_attention") == 10 * (HIDDEN // 32) ** 2 + HIDDEN**2


def test_linear_attention_costs_twice_as_much_on_twice_the_patches():
    def macs(grid):
        with torch.device("meta"):
            attention, counter = LinearAttention(64, 4), FlopCounterMode(display=False)
            with counter:
                attention(torch.empty(1, 64, *grid), None)
        return counter.get_total_flops()

    assert macs((8, 16)) == 2 * macs((8, 8))


def test_groups_of_channels_share_their_weights():
    attention = trained(MultiScaleAttention(12, 3))
    maps = torch.randn(2, 12, 4, 5)
    swapped = maps.unflatten(1, (3, 4)).flip(1).flatten(1, 2)
    expected = attention(maps, None).unflatten(1, (3, 4)).flip(1).flatten(1, 2)
    torch.testing.assert_close(attention(swapped, None), expected)


def test_every_group_has_one_gate_between_nothing_and_its_gain():
    maps = torch.randn(2, 12, 4, 5)
    gates = trained(MultiScaleAttention(12, 3, gain=2.0))(maps, None) / maps
    gates = gates.unflatten(1, (3, 4))
    assert gates.min() > 0 and gates.max() < 2
    torch.testing.assert_close(gates, gates[:, :, :1].expand_as(gates), rtol=1e-3, atol=1e-4)


def test_linear_attention_is_the_softmax_of_queries_and_keys_apart():
    attention = LinearAttention(8, 2).double()
    maps = torch.randn(1, 8, 3, 4, dtype=torch.float64)
    patches = maps.flatten(2).transpose(1, 2)
    query, key, value = attention.qkv(patches).chunk(3, dim=2)
    parts = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = query[..., head].softmax(2) @ key[..., head].softmax(1).transpose(1, 2)  # (batch, patches, patches)
        torch.testing.assert_close(scores.sum(), scores.new_tensor(12.0))  # on average a row sums to one
        parts.append(scores @ value[..., head])
    expected = patches + attention.out_proj(torch.cat(parts, dim=2))
    torch.testing.assert_close(attention(maps, None).flatten(2).transpose(1, 2), expected)


@pytest.mark.parametrize("options", [{"groups": 4}, {"attention": "linear", "num_heads": 2}], ids=["ema", "linear"])
def test_padding_changes_nothing(options):
    fusion = trained(EfficientAttentionFusion(3, 32, **options)).double().eval()
    tokens = random_tokens(grid=(3, 4), dtype=torch.float64)

    def pad(patches):
        return F.pad(patches.unflatten(-2, (3, 4)), (0, 0, 0, 2, 0, 1), value=5.0).flatten(-3, -2)

    mask = pad(torch.ones(2, 12, 1)) == 1
    wide = replace(tokens, patches=pad(tokens.patches), base_patches=pad(tokens.base_patches), grid=(4, 6))
    expected, found = fusion(tokens), fusion(replace(wide, patch_mask=mask[..., 0]))
    torch.testing.assert_close(found.pooled, expected.pooled)
    torch.testing.assert_close(found.patches[mask[..., 0]].view_as(expected.patches), expected.patches)


def test_the_direct_form_starts_near_its_input():
    tokens = random_tokens(layers=1)
    direct = EfficientAttentionFusion(1, 32, groups=8, norm="none", direct=True)
    ratio = direct(tokens).patches / tokens.patches[:, 0]
    assert 0.7 < ratio.mean() < 1.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 5}, "groups to divide hidden_size=32, got 5"),
        ({"attention": "flash"}, "attention to be one of"),
        ({"attention": "linear", "num_heads": 5}, "num_heads to divide hidden_size=32"),
        ({"attention": "linear", "groups": 4}, "has no groups, got groups=4"),
        ({"num_heads": 4}, "has no num_heads, got num_heads=4"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EfficientAttentionFusion(2, 32, **options)


def test_a_single_patch_is_refused():
    with pytest.raises(ValueError, match="at least two patches"):
        EfficientAttentionFusion(2, 32)(random_tokens(layers=2, grid=(1, 1)))

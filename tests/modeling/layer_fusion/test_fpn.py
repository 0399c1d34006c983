"""Pyramids: cost, strides, which layer makes which level, padding, thin and odd grids."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fusion_costs import HIDDEN, count_weights
from fusion_tokens import random_tokens, trained
from torch import nn

from vitweave.modeling.layer_fusion.fpn import FpnFusion

SMALL = {"out_channels": 8}


def sizes(options, grid, layers=4):
    fused = FpnFusion(layers, 32, **SMALL, **options)(random_tokens(layers=layers, grid=grid))
    return [tuple(level.shape[-2:]) for level in fused.feature_maps]


def test_the_size_is_that_of_the_formula():
    out = 256
    assert count_weights("fpn") == 3 * (HIDDEN * out + 9 * out**2) + 3 * out * HIDDEN + 4 * HIDDEN**2


@pytest.mark.parametrize(
    ("options", "grid", "expected"),
    [
        ({}, (4, 6), [(8, 12), (4, 6), (2, 3)]),
        ({}, (5, 7), [(10, 14), (5, 7), (2, 3)]),
        ({}, (1, 3), [(2, 6), (1, 3), (1, 1)]),
        ({"scales": [4, 1], "extra_level": True}, (3, 5), [(12, 20), (3, 5), (2, 3)]),
        ({"style": "last"}, (4, 6), [(16, 24), (8, 12), (4, 6), (2, 3)]),
        ({"style": "last", "scales": [1, 0.5], "extra_level": True}, (5, 7), [(5, 7), (2, 3), (1, 2)]),
        ({"style": "dpt"}, (4, 6), [(32, 48), (16, 24), (8, 12), (4, 6)]),
    ],
    ids=str,
)
def test_the_levels_have_their_sizes(options, grid, expected):
    assert sizes(options, grid) == expected


def changed_levels(options: dict, layer: int) -> list[bool]:
    """Which levels, fine to coarse, notice that one layer has changed."""
    fusion, tokens = trained(FpnFusion(4, 32, **SMALL, **options)), random_tokens(layers=4)
    other = tokens.patches.clone()
    other[:, layer] = torch.randn_like(other[:, layer])
    before, after = fusion(tokens).feature_maps, fusion(replace(tokens, patches=other)).feature_maps
    return [not torch.allclose(a, b) for a, b in zip(before, after, strict=True)]


def test_deep_layers_reach_every_level_and_shallow_ones_the_finest():
    assert [changed_levels({}, layer) for layer in range(4)] == [
        [True, False, False],
        [False, False, False],  # four layers, three levels: the second makes none
        [True, True, False],
        [True, True, True],
    ]
    assert changed_levels({"layer_of_level": [3, 2, 1]}, 1) == [True, True, True]
    assert [any(changed_levels({"style": "last"}, layer)) for layer in range(4)] == [False, False, False, True]
    assert changed_levels({"style": "dpt"}, 0) == [True, False, False, False]


def test_layers_without_a_level_have_nothing_to_train():
    fusion = FpnFusion(4, 32)
    assert [isinstance(norm, nn.LayerNorm) for norm in fusion.norm_patch] == [True, False, True, True]
    fusion = FpnFusion(5, 32, style="last")
    assert [isinstance(norm, nn.LayerNorm) for norm in fusion.norm_patch] == [False] * 4 + [True]
    fusion = FpnFusion(5, 32, style="dpt", layer_of_level=[0, 1, 1, 4])
    for norms in (fusion.norm_cls, fusion.norm_patch):
        assert [isinstance(norm, nn.LayerNorm) for norm in norms] == [True, True, False, False, True]


@pytest.mark.parametrize("readout", ["ignore", "add", "project"])
def test_dpt_reads_the_class_tokens_unless_told_otherwise(readout):
    fusion, tokens = trained(FpnFusion(4, 32, style="dpt", cls_readout=readout, **SMALL)), random_tokens(layers=4)
    other = fusion(replace(tokens, cls=tokens.cls.flip(1))).feature_maps
    assert torch.equal(other[0], fusion(tokens).feature_maps[0]) == (readout == "ignore")
    assert ("cls" in fusion.needs) == (readout != "ignore")


@pytest.mark.parametrize("style", ["fpn", "last"])
def test_padding_changes_nothing(style):
    fusion = trained(FpnFusion(3, 32, style=style, **SMALL)).double().eval()
    tokens = random_tokens(grid=(4, 6), dtype=torch.float64)

    def pad(patches):
        return F.pad(patches.unflatten(-2, (4, 6)), (0, 0, 0, 2, 0, 4), value=5.0).flatten(-3, -2)

    mask = pad(torch.ones(2, 24, 1))[..., 0] == 1
    wide = replace(tokens, patches=pad(tokens.patches), base_patches=pad(tokens.base_patches), grid=(8, 8))
    expected, found = fusion(tokens), fusion(replace(wide, patch_mask=mask))
    torch.testing.assert_close(found.pooled, expected.pooled)
    for level, wide_level in zip(expected.feature_maps, found.feature_maps, strict=True):
        height, width = level.shape[-2:]
        torch.testing.assert_close(wide_level[:, :, :height, :width], level)
        assert not wide_level[:, :, height:].any() and not wide_level[:, :, :, width:].any()


@pytest.mark.parametrize("style", ["fpn", "last", "dpt"])
def test_masked_patches_leave_no_trace_in_the_maps(style):
    fusion, tokens = trained(FpnFusion(4, 32, style=style, **SMALL)), random_tokens(layers=4)
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[0, 7], mask[1, 10:] = False, False
    masked = replace(tokens, patch_mask=mask)
    other = replace(masked, patches=tokens.patches.masked_fill(~mask[:, None, :, None], float("inf")))
    for before, after in zip(fusion(masked).feature_maps, fusion(other).feature_maps, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "bifpn"}, "style to be one of"),
        ({"scales": [8, 1]}, "expected scales out of"),
        ({"layer_of_level": [0, 1]}, "expected 3 layers from 0 to 3, one per level"),
        ({"layer_of_level": [0, 1, 4]}, "expected 3 layers from 0 to 3, one per level"),
        ({"style": "last", "layer_of_level": [0, 1, 2, 3]}, "every level from the deepest layer"),
        ({"cls_readout": "add"}, "belong to style='dpt'"),
        ({"style": "dpt", "cls_readout": "mean"}, "unknown readout 'mean'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FpnFusion(4, 32, **options)

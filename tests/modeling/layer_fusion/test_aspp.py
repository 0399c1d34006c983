"""ASPP: its cost, what its rates reach, padding, and image pooling of a single image."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fusion_costs import HIDDEN, LAYERS, count_weights
from fusion_tokens import random_tokens, trained

from vitweave.modeling.layer_fusion.aspp import Aspp, AsppFusion


def test_the_size_is_that_of_the_formula():
    reduced, mid, rates = 256, 128, 3
    branches = reduced * mid * (2 + 9 * rates) + (rates + 2) * mid * HIDDEN
    assert count_weights("aspp") == LAYERS * HIDDEN * reduced + branches + HIDDEN**2


def test_a_rate_reaches_as_far_as_it_says():
    maps = torch.zeros(1, 4, 9, 9)
    branch = Aspp(4, 4, 4, rates=[3]).branches[1].conv
    reached = branch(maps.index_fill(2, torch.tensor(4), 0).clone())
    maps[0, :, 4, 4] = 1
    rows, columns = (branch(maps) - reached).abs().sum((0, 1)).nonzero(as_tuple=True)
    assert set(rows.tolist()) == set(columns.tolist()) == {1, 4, 7}


def test_rates_beyond_the_grid_are_told_and_see_their_centre_only():
    fusion = AsppFusion(1, 32, rates=[2, 6, 14])
    with pytest.warns(UserWarning, match=r"rates \[6, 14\] reach beyond a grid of 4x6 .* largest useful rate is 5"):
        fusion.check_grid((4, 6))
    conv = fusion.aspp.branches[2].conv
    maps = torch.randn(1, 256, 4, 6)
    torch.testing.assert_close(conv(maps), F.conv2d(maps, conv.weight[:, :, 1:2, 1:2]))


def test_rates_that_fit_are_not_told_of(recwarn):
    AsppFusion(1, 32).check_grid((14, 14))
    AsppFusion(1, 32, rates=[1]).check_grid((1, 1))
    assert not recwarn


@pytest.mark.parametrize("map_norm", ["group", "batch"])
def test_padding_changes_nothing(map_norm):
    fusion = trained(AsppFusion(2, 32, reduced_channels=16, mid_channels=8, map_norm=map_norm)).double().eval()
    tokens = random_tokens(layers=2, grid=(3, 4), dtype=torch.float64)

    def pad(patches):
        return F.pad(patches.unflatten(-2, (3, 4)), (0, 0, 0, 2, 0, 1), value=5.0).flatten(-3, -2)

    mask = pad(torch.ones(2, 12, 1))[..., 0] == 1
    wide = replace(tokens, patches=pad(tokens.patches), base_patches=pad(tokens.base_patches), grid=(4, 6))
    expected, found = fusion(tokens), fusion(replace(wide, patch_mask=mask))
    torch.testing.assert_close(found.pooled, expected.pooled)
    torch.testing.assert_close(found.patches[mask].view_as(expected.patches), expected.patches)


@pytest.mark.parametrize("map_norm", ["group", "batch"])
def test_one_image_trains(map_norm):
    fusion = trained(AsppFusion(2, 32, map_norm=map_norm)).train()
    fusion(random_tokens(batch=1, layers=2)).pooled.square().sum().backward()
    pooling = fusion.aspp.pooling.conv.weight.grad
    assert torch.isfinite(pooling).all() and pooling.any()


def test_batch_norm_learns_only_from_more_than_one_image():
    fusion = AsppFusion(2, 32, map_norm="batch").train()
    fusion(random_tokens(batch=1, layers=2))
    assert fusion.aspp.pooling.norm.num_batches_tracked == 0 < fusion.aspp.branches[0].norm.num_batches_tracked
    fusion(random_tokens(batch=2, layers=2))
    assert fusion.aspp.pooling.norm.num_batches_tracked == 1


def test_the_layers_keep_their_places():
    fusion, tokens = trained(AsppFusion(3, 32)), random_tokens()
    swapped = replace(tokens, patches=tokens.patches.flip(1))
    assert not torch.allclose(fusion(swapped).pooled, fusion(tokens).pooled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": [0, 2]}, r"rates of 1 or more, got \[0, 2\]"),
        ({"map_norm": "layer"}, "map_norm to be one of"),
        ({"map_norm": "batch", "norm_groups": 4}, "has no groups, got norm_groups=4"),
        ({"norm_groups": 5}, "divides 128 channels, got 5"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AsppFusion(2, 32, **options)

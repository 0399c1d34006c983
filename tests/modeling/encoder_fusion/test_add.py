"""The sum: equal to the first encoder at the start, the formula, what gets a gradient when."""

import pytest
import torch
import torch.nn.functional as F
from encoder_maps import random_maps, trained
from torch import nn

from vitweave.modeling.encoder_fusion.add import AddFusion
from vitweave.modeling.layer_fusion.base import ZeroLinear

GRIDS = [(4, 6), (2, 3), (8, 12)]
CHANNELS = [32, 48, 16]


def tokens(feature_map):
    return feature_map.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_sum_is_the_first_encoder(dtype):
    features = random_maps(CHANNELS, GRIDS, dtype=dtype)
    assert torch.equal(AddFusion(CHANNELS, GRIDS).to(dtype)(features), tokens(features.maps[0]))
    wider = AddFusion(CHANNELS, GRIDS, 64).to(dtype)
    assert torch.equal(wider(features), wider.base_proj(tokens(features.maps[0])))
    direct = AddFusion(CHANNELS, GRIDS, direct=True).to(dtype)
    assert not torch.allclose(direct(features), tokens(features.maps[0]), atol=0.1)


def test_the_formula():
    fusion, features = trained(AddFusion(CHANNELS, GRIDS)), random_maps(CHANNELS, GRIDS)
    resized = [F.interpolate(m, size=(4, 6), mode="bilinear", align_corners=True) for m in features.maps[1:]]
    expected = tokens(features.maps[0])
    for projection, feature_map in zip(fusion.projs, resized, strict=True):
        expected = expected + tokens(feature_map) @ projection.weight.T + projection.bias
    torch.testing.assert_close(fusion(features), expected)


def test_projections_move_first_and_then_the_other_encoders():
    fusion, features = AddFusion(CHANNELS, GRIDS), random_maps(CHANNELS, GRIDS)
    other = features.maps[1].requires_grad_()
    optimizer = torch.optim.SGD(fusion.parameters(), lr=0.1)
    fusion(features).square().sum().backward()
    assert all(p.grad.any() for p in fusion.parameters()) and not other.grad.any()
    optimizer.step()
    fusion(features).square().sum().backward()
    assert other.grad.any()


def test_start_values_by_option():
    assert all(type(proj) is ZeroLinear for proj in AddFusion(CHANNELS, GRIDS).projs)
    assert all(type(proj) is nn.Linear and proj.weight.any() for proj in AddFusion(CHANNELS, GRIDS, direct=True).projs)


def test_one_encoder_alone_passes():
    features = random_maps([32], [(4, 6)])
    assert torch.equal(AddFusion([32], [(4, 6)])(features), tokens(features.maps[0]))


def test_grids_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="of encoder 1 that resize='avg_pool' cuts into 4x6 whole blocks, got 2x3"):
        AddFusion(CHANNELS, GRIDS, resize="avg_pool")

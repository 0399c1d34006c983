"""Deformable attention: against loops over tokens, heads and points, and where a sample is known by hand."""

import pytest
import torch
import torch.nn.functional as F
from encoder_maps import random_maps, trained

from vitweave.modeling.encoder_fusion.base import EncoderMaps
from vitweave.modeling.encoder_fusion.deformable import DeformableFusion

GRIDS = [(2, 3), (4, 5), (2, 7)]
CHANNELS = [32, 48, 16]


def at(values: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Bilinear value of (channels, height, width) at cell coordinates with centres at 0.5, 1.5, ...; zero outside."""
    channels, height, width = values.shape
    found = values.new_zeros(channels)
    for row in range(height):
        for column in range(width):
            share = max(0.0, 1 - abs(x - column - 0.5)) * max(0.0, 1 - abs(y - row - 0.5))
            if share:
                found += share * values[:, row, column]
    return found


def one_by_one(fusion: DeformableFusion, features: EncoderMaps, image: int) -> torch.Tensor:
    """The formula of the docstring for one image, one sample at a time."""
    heads, maps, points = fusion.shape
    height, width = features.maps[0].shape[-2:]
    values = [
        torch.einsum("dc,chw->dhw", proj.weight, m[image]) + proj.bias[:, None, None]
        for proj, m in zip(fusion.value_projs, features.maps[1:], strict=True)
    ]
    out = []
    for row in range(height):
        for column in range(width):
            query = features.maps[0][image, :, row, column]
            offsets = fusion.offsets(query).view(heads, maps, points, 2)
            weights = fusion.scores(query).view(heads, -1).softmax(dim=1).view(heads, maps, points)
            context = [values[0].new_zeros(len(query) // heads) for _ in range(heads)]
            for m in range(heads):
                for j in range(maps):
                    of_head = values[j].chunk(heads)[m]
                    for k in range(points):
                        x, y = offsets[m, j, k].tolist()
                        x = (column + 0.5) / width * of_head.shape[2] + x
                        y = (row + 0.5) / height * of_head.shape[1] + y
                        context[m] = context[m] + weights[m, j, k] * at(of_head, x, y)
            out.append(query + fusion.out_proj(torch.cat(context)))
    return torch.stack(out)


def test_the_formula():
    fusion = trained(DeformableFusion(CHANNELS, GRIDS, num_heads=4, num_points=3)).double()
    features = random_maps(CHANNELS, GRIDS, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fusion(features)[1], one_by_one(fusion, features, 1))


def test_a_fresh_fusion_is_the_first_encoder():
    features = random_maps(CHANNELS, GRIDS)
    expected = features.maps[0].flatten(2).transpose(1, 2)
    assert torch.equal(DeformableFusion(CHANNELS, GRIDS)(features), expected)
    wider = DeformableFusion(CHANNELS, GRIDS, 64)
    assert torch.equal(wider(features), wider.query_proj(expected))


def sees_through(grids: list) -> DeformableFusion:
    """One point per head at the query's own place, and projections that change nothing."""
    fusion = DeformableFusion([32, 32], grids, num_heads=2, num_points=1)
    with torch.no_grad():
        fusion.offsets.bias.zero_()
        for layer in (fusion.value_projs[0], fusion.out_proj):
            layer.weight.copy_(torch.eye(32))
            layer.bias.zero_()
    return fusion


def test_without_offsets_a_token_reads_its_own_cell():
    same = random_maps([32, 32], [(3, 4), (3, 4)])
    fusion = sees_through([(3, 4), (3, 4)])
    torch.testing.assert_close(fusion(same), sum(same.maps).flatten(2).transpose(1, 2))
    finer = random_maps([32, 32], [(3, 4), (6, 8)])  # the centre of a cell is the corner of four finer ones
    expected = finer.maps[0] + F.avg_pool2d(finer.maps[1], 2)
    torch.testing.assert_close(fusion(finer), expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("offset", "expected"),
    [((0, 0), 2.5), ((1, 0.5), 5), ((-1, -0.5), 0), ((0, 0.5), 4), ((0.5, 0), 3), ((9, 0), 0), ((1.5, 0.5), 2.5)],
)
def test_an_offset_is_counted_in_cells_and_zero_lies_outside(offset, expected):
    fusion = sees_through([(1, 1), (2, 3)])
    with torch.no_grad():
        fusion.offsets.bias.copy_(torch.tensor(offset).repeat(2))
    other = torch.arange(6.0).view(1, 1, 2, 3).expand(1, 32, 2, 3)
    fused = fusion(EncoderMaps([torch.zeros(1, 32, 1, 1), other]))
    torch.testing.assert_close(fused, torch.full((1, 1, 32), float(expected)), atol=1e-5, rtol=1e-5)


def test_points_start_on_rays_all_around():
    rings = DeformableFusion(CHANNELS, GRIDS, num_heads=8, num_points=2).offsets
    assert not rings.weight.any()
    bias = rings.bias.view(8, 2, 2, 2)
    rays = torch.tensor([[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]]).float()
    for index in range(2):
        torch.testing.assert_close(bias[:, index, 0], rays, atol=1e-5, rtol=0)
        torch.testing.assert_close(bias[:, index, 1], 2 * rays, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("channels", "options", "message"),
    [
        ([32], {}, "a second encoder whose map the tokens of the first one sample, got one"),
        ([32, 16], {"num_heads": 5}, "expected num_heads to divide the hidden size 32, got 5"),
        ([32, 16], {"hidden_size": 36, "num_heads": 8}, "divide the hidden size 36"),
        ([32, 16], {"num_points": 0}, "at least one point per head and map, got num_points=0"),
    ],
)
def test_what_does_not_fit_is_refused(channels, options, message):
    with pytest.raises(ValueError, match=message):
        DeformableFusion(channels, GRIDS[: len(channels)], **options)

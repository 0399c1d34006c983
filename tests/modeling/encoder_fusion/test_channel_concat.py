"""Channel concatenation: order, grids, when there is a projector, refusals."""

import pytest
import torch
import torch.nn.functional as F
from encoder_maps import random_maps

from vitweave.modeling.encoder_fusion.channel_concat import ChannelConcatFusion
from vitweave.modeling.projectors import IdentityProjector, LinearProjector, MlpProjector

GRIDS = [(4, 6), (2, 3), (8, 12)]
CHANNELS = [32, 8, 16]


@pytest.mark.parametrize(("resize", "align_corners"), [("bilinear_ac", True), ("bilinear", False)])
def test_maps_meet_on_one_grid_in_the_order_of_the_encoders(resize, align_corners):
    features = random_maps(CHANNELS, GRIDS)
    for grid, height, width in ((None, 4, 6), ((3, 5), 3, 5), (7, 7, 7)):
        fused = ChannelConcatFusion(CHANNELS, GRIDS, grid=grid, resize=resize)(features)
        maps = [
            F.interpolate(m, size=(height, width), mode="bilinear", align_corners=align_corners) for m in features.maps
        ]
        expected = torch.cat(maps, dim=1).permute(0, 2, 3, 1).reshape(2, height * width, sum(CHANNELS))
        torch.testing.assert_close(fused, expected)
    fused = ChannelConcatFusion(CHANNELS, GRIDS)(features)
    assert torch.equal(fused[..., :32].mT.reshape(2, 32, 4, 6), features.maps[0])


def test_a_projector_is_there_where_it_is_asked_for():
    def projector_of(hidden_size=None, **options):
        return type(ChannelConcatFusion(CHANNELS, GRIDS, hidden_size, **options).projector)

    assert projector_of() is projector_of(56) is IdentityProjector
    assert projector_of(40) is MlpProjector
    assert projector_of(projector="linear") is projector_of(40, projector="linear") is LinearProjector


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "nearest"}, "expected resize to be one of .* got 'nearest'"),
        ({"resize": "avg_pool"}, "of encoder 1 that resize='avg_pool' cuts into 4x6 whole blocks, got 2x3"),
        ({"resize": "align_ac", "grid": (3, 3)}, "of encoder 0 that resize='align_ac' cuts into 3x3 whole blocks"),
        (
            {"hidden_size": 40, "projector": "identity"},
            "sum of all channels, 56, with projector='identity', got 40",
        ),
        ({"projector": "mpl2x_gelu"}, "unknown projector 'mpl2x_gelu'"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ChannelConcatFusion(CHANNELS, GRIDS, **options)

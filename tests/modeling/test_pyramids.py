"""Necks from a plain ViT's maps to pyramids: sizes, padding, start values, bad scales (numbers: reference vectors)."""

import pytest
import torch
import torch.nn.functional as F

from vitweave.modeling.pyramids import FeaturePyramid, PyramidConv, Resample, SimpleFeaturePyramid


def test_odd_sizes_meet_again():
    pyramid = FeaturePyramid([4, 4, 4], out_channels=6)
    maps = [torch.randn(2, 4, *size) for size in ((9, 7), (5, 4), (2, 2))]
    assert [tuple(level.shape) for level in pyramid(maps, [None] * 3)] == [(2, 6, 9, 7), (2, 6, 5, 4), (2, 6, 2, 2)]


def test_coarse_levels_reach_the_fine_ones_and_not_the_other_way():
    pyramid = FeaturePyramid([4, 4], out_channels=6)
    fine, coarse = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 2, 2)
    before, other = pyramid([fine, coarse], [None] * 2), pyramid([fine + 1, coarse], [None] * 2)
    assert torch.equal(before[1], other[1]) and not torch.equal(before[0], other[0])
    assert not torch.equal(before[0], pyramid([fine, coarse + 1], [None] * 2)[0])


def test_padding_changes_nothing():
    maps = torch.randn(2, 8, 4, 6)
    mask = F.pad(torch.ones(2, 1, 4, 6, dtype=torch.bool), (0, 2, 0, 4))
    pyramid = SimpleFeaturePyramid(8, 6).double()
    expected, _ = pyramid(maps.double())
    found, masks = pyramid(F.pad(maps.double(), (0, 2, 0, 4)), mask)
    for level, wide, level_mask in zip(expected, found, masks, strict=True):
        height, width = level.shape[-2:]
        torch.testing.assert_close(wide[:, :, :height, :width], level)
        assert level_mask.sum() == 2 * height * width and not wide.masked_select(~level_mask).any()


@pytest.mark.parametrize(("narrowing", "channels"), [(False, 8), (True, 2)])
def test_four_times_finer_takes_two_doublings(narrowing, channels):
    resample = Resample(8, 4, narrowing)
    maps, mask = resample(torch.randn(1, 8, 3, 5), None)
    assert maps.shape == (1, channels, 12, 20) and resample.out_channels == channels and mask is None


def test_pyramid_convolutions_start_as_published():
    conv = PyramidConv(16, 32, 3, padding=1)
    assert not conv.bias.any()
    bound = (3 / (16 * 9)) ** 0.5  # Kaiming-uniform with a = 1
    assert 0.9 * bound < conv.weight.abs().max() <= bound


@pytest.mark.parametrize("scales", [(), (3,), (1, 2), (2, 0.25)])
def test_bad_scales_are_refused(scales):
    with pytest.raises(ValueError, match=r"expected scales out of \(4, 2, 1, 0.5\), fine to coarse"):
        SimpleFeaturePyramid(8, 4, scales)

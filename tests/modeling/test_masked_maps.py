"""Norms and pooling of padded maps: as if the padding were not there."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitweave.modeling.masked_maps import (
    MaskedBatchNorm,
    MaskedGroupNorm,
    enlarge_mask,
    group_norm,
    halve,
    mask_at,
    mask_to_map,
    masked_mean,
)


def padded(maps: torch.Tensor, right: int, bottom: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The maps with sevens to their right and below them, and the mask of what was there before."""
    mask = F.pad(torch.ones_like(maps[:, :1], dtype=torch.bool), (0, right, 0, bottom))
    return F.pad(maps, (0, right, 0, bottom), value=7.0), mask


@pytest.mark.parametrize("norm", [MaskedGroupNorm(2, 6), MaskedBatchNorm(6)], ids=["group", "batch"])
def test_norms_do_not_see_the_padding(norm):
    nn.init.normal_(norm.weight)
    maps = torch.randn(3, 6, 4, 5)
    expected = norm.train()(maps)
    after = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    if after:
        norm.reset_running_stats()
    found = norm(*padded(maps, 2, 1))
    torch.testing.assert_close(found[:, :, :4, :5], expected)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(buffer, after[name])


def test_half_precision_statistics_are_taken_in_float32():
    norm = MaskedGroupNorm(2, 6)
    maps = 100 + torch.randn(2, 6, 8, 8)
    found = norm.bfloat16()(maps.bfloat16(), torch.ones(2, 1, 8, 8, dtype=torch.bool))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, norm(maps.bfloat16()))


def test_one_value_per_channel_is_normed_by_the_running_statistics():
    norm = MaskedBatchNorm(3).train()
    maps = torch.randn(1, 3, 1, 1)
    torch.testing.assert_close(norm(maps), norm.eval()(maps))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm2d(3).train()(maps)


@pytest.mark.parametrize(("channels", "groups"), [(768, 32), (128, 32), (32, 16), (8, 4), (33, 1), (1, 1)])
def test_groups_hold_two_channels_at_least(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="divides 32 channels, got 5"):
        group_norm(32, 5)


def test_means_and_halves_do_not_see_the_padding():
    maps = torch.randn(2, 3, 4, 6) - 5  # all below zero: a zero from the padding would win every maximum
    wide, mask = padded(maps, 3, 2)
    torch.testing.assert_close(masked_mean(wide, mask), maps.mean((2, 3), keepdim=True))
    half, half_mask = halve(wide, mask)
    torch.testing.assert_close(half[:, :, :2, :3], F.max_pool2d(maps, 2))
    assert half.shape[-2:] == half_mask.shape[-2:] == (3, 4)
    assert half_mask[:, :, :2, :3].all() and half_mask.sum() == 12 and not half[:, :, 2:].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1)])
def test_a_thin_map_keeps_its_thin_side(size):
    half, _ = halve(torch.randn(1, 2, *size), None)
    assert half.shape[-2:] == tuple(max(1, length // 2) for length in size)


def test_masks_follow_the_grid():
    patch_mask = torch.tensor([[1, 1, 0, 1, 0, 0]]).bool()
    mask = mask_to_map(patch_mask, (2, 3))
    assert mask.tolist() == [[[[True, True, False], [True, False, False]]]]
    assert torch.equal(enlarge_mask(mask, 2), mask_at(mask, (4, 6), torch.float32))
    assert mask_to_map(None, (2, 3)) is enlarge_mask(None, 2) is mask_at(None, (4, 6), torch.float32) is None

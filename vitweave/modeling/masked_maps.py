"""Maps (batch, channels, height, width) of which some positions are padding: norms and pooling over the valid ones.

A mask is (batch, 1, height, width), True = valid, or None for "all". With masked positions at zero in front of every
convolution, padding a map at the right or bottom changes nothing at its valid positions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mask_to_map(patch_mask: Tensor | None, grid: tuple[int, int]) -> Tensor | None:
    """(batch, height * width) -> (batch, 1, height, width)."""
    return None if patch_mask is None else patch_mask.bool().unflatten(1, grid).unsqueeze(1)


def zero_masked(maps: Tensor, mask: Tensor | None) -> Tensor:
    """Put zero at the masked positions, whatever stood there."""
    return maps if mask is None else maps.masked_fill(~mask, 0)


def masked_mean(maps: Tensor, mask: Tensor | None, dim: tuple[int, ...] = (2, 3)) -> Tensor:
    """Mean over the valid positions along `dim`, which stay with length 1; zero where there are none."""
    if mask is None:
        return maps.mean(dim, keepdim=True)
    total = zero_masked(maps, mask).sum(dim, keepdim=True, dtype=torch.promote_types(maps.dtype, torch.float32))
    return (total / mask.sum(dim, keepdim=True).clamp(min=1)).to(maps.dtype)


def masked_moments(maps: Tensor, mask: Tensor, dim: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count over the valid positions along `dim`, at least in float32, dimensions kept."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    mask = mask.expand_as(maps)
    count = mask.sum(dim, keepdim=True).clamp(min=1)
    mean = zero_masked(maps, mask).sum(dim, keepdim=True) / count
    return mean, zero_masked(maps - mean, mask).square().sum(dim, keepdim=True) / count, count


class MaskedGroupNorm(nn.GroupNorm):
    """GroupNorm over the valid positions."""

    def forward(self, maps: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return super().forward(maps)
        groups = maps.unflatten(1, (self.num_groups, -1))  # (batch, groups, channels, height, width)
        mean, variance, _ = masked_moments(groups, mask.unsqueeze(1), dim=(2, 3, 4))
        normed = ((groups - mean) * torch.rsqrt(variance + self.eps)).flatten(1, 2).to(maps.dtype)
        return normed * self.weight[:, None, None] + self.bias[:, None, None]


class MaskedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the valid positions; a single value per channel is normalised by the running statistics."""

    def forward(self, maps: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.training:
            return super().forward(maps)
        if maps.numel() == maps.shape[1]:  # its variance would be 0, and F.batch_norm refuses it
            return F.batch_norm(maps, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if mask is None:
            return super().forward(maps)
        mean, variance, count = masked_moments(maps, mask, dim=(0, 2, 3))
        with torch.no_grad():
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean.flatten().to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.flatten().to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked += 1
        normed = ((maps - mean) * torch.rsqrt(variance + self.eps)).to(maps.dtype)
        return normed * self.weight[:, None, None] + self.bias[:, None, None]


def group_norm(channels: int, groups: int | None = None) -> MaskedGroupNorm:
    """GroupNorm with `groups` groups; None takes 32 or the next divisor below with two channels or more per group."""
    if groups is None:
        groups = math.gcd(channels, 32)
        groups = groups // 2 if groups == channels and channels > 1 else groups
    if channels % groups:
        raise ValueError(f"expected a number of groups that divides {channels} channels, got {groups}")
    return MaskedGroupNorm(groups, channels)


def halve(maps: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """2x2 max-pooling with stride 2 over the valid positions, and the mask of what comes out.

    An odd last row or column is dropped, as in the published pyramids; a map of height or width 1 keeps it.
    """
    window = (min(2, maps.shape[2]), min(2, maps.shape[3]))
    if mask is None:
        return F.max_pool2d(maps, window), None
    halved_mask = F.max_pool2d(mask.to(maps.dtype), window) > 0
    lowest = torch.finfo(maps.dtype).min
    return zero_masked(F.max_pool2d(maps.masked_fill(~mask, lowest), window), halved_mask), halved_mask


def enlarge_mask(mask: Tensor | None, factor: int) -> Tensor | None:
    """The mask of a map whose positions are split into factor x factor."""
    return None if mask is None else mask.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def mask_at(mask: Tensor | None, size: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    """The mask at another size (height, width), each position taken from the nearest."""
    return None if mask is None else F.interpolate(mask.to(dtype), size=size, mode="nearest") > 0

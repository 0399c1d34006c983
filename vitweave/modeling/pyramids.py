"""Necks from maps of a plain ViT, all of one size, to pyramids of several sizes."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.masked_maps import enlarge_mask, halve, zero_masked

SCALES = (4, 2, 1, 0.5)


def check_scales(scales: Sequence[float]):
    """Refuse scales that no neck makes, and pyramids that do not go from fine to coarse."""
    if not scales or any(scale not in SCALES for scale in scales) or list(scales) != sorted(scales, reverse=True):
        raise ValueError(f"expected scales out of {SCALES}, fine to coarse, got {list(scales)}")


class PyramidConv(nn.Conv2d):
    """Convolution that starts Kaiming-uniform (a=1) with a bias of zero, as in torchvision's pyramid."""

    def reset_parameters(self) -> None:
        self.set_start_values()

    def set_start_values(self) -> None:
        """Weight Kaiming-uniform, bias zero."""
        init.kaiming_uniform_(self.weight, a=1)
        init.zeros_(self.bias)


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (batch, channels, height, width)."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.movedim(1, -1)).movedim(-1, 1)


class Resample(nn.Module):
    """A map at `scale` times its size: 2x2 transposed convolutions for each doubling, 2x2 max-pooling for the half.

    Args:
        narrowing: each doubling halves the channels, and LayerNorm and GELU stand between two of them
            (ViTDet, arXiv:2203.16527); otherwise the channels stay and nothing stands between.
    """

    def __init__(self, channels: int, scale: float, narrowing: bool = False):
        super().__init__()
        self.scale, self.doublings = scale, nn.Sequential()
        for index in range(max(0, round(math.log2(scale)))):
            if narrowing and index:
                self.doublings.extend((ChannelLayerNorm(channels, eps=1e-6), nn.GELU()))
            wide, channels = channels, channels // 2 if narrowing else channels
            self.doublings.append(nn.ConvTranspose2d(wide, channels, kernel_size=2, stride=2))
        self.out_channels = channels

    def forward(self, maps: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.scale < 1:
            return halve(maps, mask)
        return self.doublings(maps), enlarge_mask(mask, int(self.scale))


class FeaturePyramid(nn.Module):
    """Feature pyramid (arXiv:1612.03144): T_k = lateral(x_k) + up(T_{k+1}), p_k = conv3x3(T_k), fine to coarse.

    Upsampling takes the nearest neighbour and goes to the exact size of the finer map, so odd sizes fit.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int):
        super().__init__()
        self.lateral = nn.ModuleList(PyramidConv(channels, out_channels, 1) for channels in in_channels)
        self.output = nn.ModuleList(PyramidConv(out_channels, out_channels, 3, padding=1) for _ in in_channels)

    def forward(self, maps: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tensor]:
        """Maps (batch, channels_k, height_k, width_k), fine to coarse, to (batch, out_channels, ...) of their sizes."""
        levels, above = [], None
        for k in reversed(range(len(maps))):
            merged = self.lateral[k](maps[k])
            if above is not None:
                merged = merged + F.interpolate(above, size=merged.shape[-2:], mode="nearest")
            above = zero_masked(merged, masks[k])
            levels.insert(0, zero_masked(self.output[k](above), masks[k]))
        return levels


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's pyramid from one map (arXiv:2203.16527): every level is a resampling, then 1x1 and 3x3 convolutions.

    LayerNorm over the channels (eps 1e-6) follows each of the two, in place of a bias.
    """

    def __init__(self, channels: int, out_channels: int, scales: Sequence[float] = SCALES):
        super().__init__()
        check_scales(scales)
        self.resample = nn.ModuleList(Resample(channels, scale, narrowing=True) for scale in scales)
        self.lateral = nn.ModuleList(conv_norm(level.out_channels, out_channels, 1) for level in self.resample)
        self.output = nn.ModuleList(conv_norm(out_channels, out_channels, 3) for _ in scales)

    def forward(self, maps: Tensor, mask: Tensor | None = None) -> tuple[list[Tensor], list[Tensor | None]]:
        """One map (batch, channels, height, width) to its levels, fine to coarse, and the mask of each."""
        levels, masks = [], []
        for resample, lateral, output in zip(self.resample, self.lateral, self.output, strict=True):
            level, level_mask = resample(maps, mask)
            level = zero_masked(lateral(level), level_mask)
            levels.append(zero_masked(output(level), level_mask))
            masks.append(level_mask)
        return levels, masks


def conv_norm(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """Convolution without bias and LayerNorm over the channels."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, ChannelLayerNorm(out_channels, eps=1e-6))


def coarser_level(level: Tensor) -> Tensor:
    """Every second row and column: the extra level that detectors put on top of a pyramid."""
    return level[:, :, ::2, ::2]

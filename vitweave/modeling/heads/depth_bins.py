"""Depth as the expected value over fixed bins (the linear depth head of DINOv2, arXiv:2304.07193)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DepthBinsHead(nn.Module):
    """Patch map and [CLS] of each layer, upsampled, to a distribution over depth bins and its mean, in metres.

    The bins lie evenly between `min_depth` and `max_depth`, or evenly in the logarithm. (The "SID" option of the
    published code takes depths for exponents of ten; that is not reproduced.)
    """

    def __init__(
        self,
        in_channels: list[int],
        bins: int = 256,
        min_depth: float = 0.001,
        max_depth: float = 10.0,
        spacing: str = "linear",
        upsample: int = 4,
    ):
        super().__init__()
        if spacing not in ("linear", "log"):
            raise ValueError(f"expected spacing 'linear' or 'log', got {spacing!r}")
        if not 0 < min_depth < max_depth:
            raise ValueError(f"expected 0 < min_depth < max_depth, got {min_depth} and {max_depth}")
        self.bins, self.min_depth, self.max_depth = bins, min_depth, max_depth
        self.spacing, self.upsample = spacing, upsample
        self.classifier = nn.Conv2d(2 * sum(in_channels), bins, 1)

    def bin_depths(self, like: Tensor) -> Tensor:
        """(bins,) depths in metres, in the dtype and on the device of `like`."""
        ends = (self.min_depth, self.max_depth)
        ends = ends if self.spacing == "linear" else [math.log(end) for end in ends]
        depths = torch.linspace(*ends, self.bins, dtype=torch.float64, device=like.device)
        return (depths if self.spacing == "linear" else depths.exp()).to(like.dtype)

    def forward(self, maps: list[Tensor], cls_tokens: list[Tensor]) -> Tensor:
        """Depth (batch, 1, upsample * height, upsample * width) of maps (batch, channels, height, width).

        Args:
            cls_tokens: one (batch, channels) per map.
        """
        pairs = zip(maps, cls_tokens, strict=True)
        parts = [part for patches, cls in pairs for part in (patches, cls[:, :, None, None].expand_as(patches))]
        features = F.interpolate(torch.cat(parts, dim=1), scale_factor=self.upsample, mode="bilinear")
        weights = self.classifier(features).relu() + 0.1
        weights = weights / weights.sum(dim=1, keepdim=True)
        depth = torch.einsum("bnhw,n->bhw", weights, self.bin_depths(weights))
        return depth[:, None].clamp(self.min_depth, self.max_depth)

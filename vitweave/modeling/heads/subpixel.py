"""The sub-pixel segmentation head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitweave.modeling.heads.base import ProbeConv, SegmentationHead, resize_map


class SubpixelHead(SegmentationHead):
    """The linear head with `upsampling` x `upsampling` scores per position, laid out as pixels (arXiv:1609.05158).

    Bilinear upsampling of one score per patch smears whatever is thinner than a patch; with `upsampling` equal to the
    patch size every pixel has a score of its own.
    """

    def __init__(self, in_channels: list[int], num_labels: int, upsampling: int = 4):
        super().__init__()
        if upsampling < 1:
            raise ValueError(f"the head 'subpixel' needs upsampling >= 1, got {upsampling}")
        self.upsampling = upsampling
        self.norm = nn.BatchNorm2d(sum(in_channels))
        self.classifier = ProbeConv(sum(in_channels), num_labels * upsampling**2)

    def forward(self, feature_maps: list[Tensor]) -> Tensor:
        """Maps (batch, channels_k, height_k, width_k) to logits (batch, num_labels, height_0 * r, width_0 * r)."""
        size = feature_maps[0].shape[-2:]
        features = torch.cat([resize_map(feature_map, size) for feature_map in feature_maps], dim=1)
        scores = self.classifier(self.norm(features))  # (batch, num_labels * r * r, height_0, width_0)
        return F.pixel_shuffle(scores, self.upsampling)

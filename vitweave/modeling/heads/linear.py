"""The linear segmentation head."""

import torch
from torch import Tensor, nn

from vitweave.modeling.heads.base import ProbeConv, SegmentationHead, resize_map


class LinearHead(SegmentationHead):
    """BatchNorm and a 1x1 convolution on one or several layers' maps (the linear probe of DINOv2, arXiv:2304.07193).

    DINOv2 uses no dropout; DINOv3's config has `dropout=0.1` in front of the norm.
    """

    def __init__(self, in_channels: list[int], num_labels: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.norm = nn.BatchNorm2d(sum(in_channels), eps=1e-5, momentum=0.1)
        self.classifier = ProbeConv(sum(in_channels), num_labels)

    def forward(self, feature_maps: list[Tensor]) -> Tensor:
        """Maps (batch, channels_k, height_k, width_k) to logits (batch, num_labels, height_0, width_0)."""
        size = feature_maps[0].shape[-2:]
        features = torch.cat([resize_map(feature_map, size) for feature_map in feature_maps], dim=1)
        return self.classifier(self.norm(self.dropout(features)))

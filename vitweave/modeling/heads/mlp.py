"""The all-MLP segmentation head."""

import torch
from torch import Tensor, nn

from vitweave.modeling.heads.base import SegmentationHead, resize_map


class MlpHead(SegmentationHead):
    """All-MLP decoder of SegFormer (arXiv:2105.15203): project every map, upsample to the largest, concatenate, fuse.

    The maps are concatenated from the last to the first, as in the released code, so that its weights fit.
    """

    def __init__(self, in_channels: list[int], num_labels: int, hidden_size: int = 256, dropout: float = 0.1):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(channels, hidden_size) for channels in in_channels)
        self.fuse = nn.Conv2d(len(in_channels) * hidden_size, hidden_size, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(hidden_size, num_labels, kernel_size=1)

    def forward(self, feature_maps: list[Tensor]) -> Tensor:
        """Maps (batch, channels_k, height_k, width_k) to logits at the size of the largest map."""
        size = tuple(max([feature_map.shape[axis] for feature_map in feature_maps]) for axis in (2, 3))
        projected = []
        for feature_map, projection in zip(feature_maps, self.projections, strict=True):
            hidden = projection(feature_map.movedim(1, -1)).movedim(-1, 1)  # (batch, hidden, height_k, width_k)
            projected.append(resize_map(hidden, size))
        fused = self.fuse(torch.cat(projected[::-1], dim=1))  # (batch, hidden, height, width)
        return self.classifier(self.dropout(self.norm(fused).relu()))

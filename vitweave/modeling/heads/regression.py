"""The regression depth head."""

import torch
from torch import Tensor, nn

from vitweave.modeling.heads.base import DepthHead, ProbeConv, resize_map


class RegressionHead(DepthHead):
    """BatchNorm and a 1x1 convolution on one or several layers' maps to one value: the plainest depth head."""

    def __init__(
        self,
        in_channels: list[int],
        depth_target: str = "metres",
        min_depth: float = 0.001,
        max_depth: float = 10.0,
        dropout: float = 0.0,
    ):
        super().__init__(depth_target, min_depth, max_depth)
        self.dropout = nn.Dropout2d(dropout)
        self.norm = nn.BatchNorm2d(sum(in_channels))
        self.regressor = ProbeConv(sum(in_channels), 1)

    def forward(self, feature_maps: list[Tensor], class_tokens: list[Tensor] | None = None) -> Tensor:
        """Values (batch, 1, height_0, width_0)."""
        size = feature_maps[0].shape[-2:]
        features = torch.cat([resize_map(feature_map, size) for feature_map in feature_maps], dim=1)
        return self.to_value(self.regressor(self.norm(self.dropout(features))))

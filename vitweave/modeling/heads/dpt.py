"""The DPT depth head."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from vitweave.modeling.dpt_neck import DptNeck
from vitweave.modeling.heads.base import DeepConv, DepthHead


class DptHead(DepthHead):
    """The neck of DPT over several layers and three convolutions (arXiv:2103.13413).

    Its last activation is that of `DepthHead.to_value`; the published heads end in a ReLU.

    Args:
        neck_sizes, fusion_size, factors, readout: see `vitweave.modeling.dpt_neck.DptNeck`.
        hidden_size: channels in front of the last convolution.
    """

    def __init__(
        self,
        in_channels: list[int],
        depth_target: str = "metres",
        min_depth: float = 0.001,
        max_depth: float = 10.0,
        neck_sizes: Sequence[int] | None = None,
        fusion_size: int = 64,
        factors: Sequence[float] | None = None,
        readout: str = "project",
        hidden_size: int = 32,
    ):
        super().__init__(depth_target, min_depth, max_depth)
        self.neck = DptNeck(in_channels, neck_sizes, fusion_size, factors, readout)
        self.reads_class_tokens = self.neck.reads_class_tokens
        self.conv1 = DeepConv(fusion_size, max(fusion_size // 2, 1), kernel_size=3, padding=1)
        self.conv2 = DeepConv(max(fusion_size // 2, 1), hidden_size, kernel_size=3, padding=1)
        self.regressor = DeepConv(hidden_size, 1, kernel_size=1)

    def forward(self, feature_maps: list[Tensor], class_tokens: list[Tensor] | None = None) -> Tensor:
        """Values at four times the size of the finest map of the neck's pyramid."""
        tokens = class_tokens if self.reads_class_tokens else None
        hidden = self.conv1(self.neck(feature_maps, tokens)[-1])
        hidden = F.interpolate(hidden, scale_factor=2, mode="bilinear", align_corners=True)
        return self.to_value(self.regressor(self.conv2(hidden).relu()))

"""The all-MLP segmentation head."""

import torch
from torch import Tensor, nn

from vitweave.modeling.heads.base import SegmentationHead, resize_map
from vitweave.modeling.masked_batch_norm import MaskedBatchNorm2d


class MlpHead(SegmentationHead):
    """All-MLP decoder of SegFormer (arXiv:2105.15203): project every map, upsample to the largest, concatenate, fuse.

    The maps are concatenated from the last to the first, as in the released code, so that its weights fit.

    Args:
        hidden_size: channels of every projected map.
        dropout: in front of the classifier.
        drop_channels: the dropout takes whole channels (SegFormer's own code, TokenFusion, GeminiFusion) instead of
            single values (transformers).
        frozen_norm: the batch norm keeps the statistics it has (TokenFusion and GeminiFusion on NYUDv2 and SUN RGB-D
            train with mean 0 and variance 1 for ever).
        fuse_bias: the convolution in front of the norm has a bias (CMX).
        norm_eps: of the batch norm.
    """

    def __init__(
        self,
        in_channels: list[int],
        num_labels: int,
        hidden_size: int = 256,
        dropout: float = 0.1,
        drop_channels: bool = False,
        frozen_norm: bool = False,
        fuse_bias: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(channels, hidden_size) for channels in in_channels)
        self.fuse = nn.Conv2d(len(in_channels) * hidden_size, hidden_size, kernel_size=1, bias=fuse_bias)
        self.norm = MaskedBatchNorm2d(hidden_size, frozen_norm, norm_eps)
        self.dropout = nn.Dropout2d(dropout) if drop_channels else nn.Dropout(dropout)
        self.classifier = nn.Conv2d(hidden_size, num_labels, kernel_size=1)

    def forward(self, feature_maps: list[Tensor], valid: Tensor | None = None) -> Tensor:
        """Maps (batch, channels_k, height_k, width_k) to logits at the size of the largest map.

        Args:
            valid: (batch,), bool, rows that count in the statistics of the batch norm; None where all do.
        """
        size = tuple(max([feature_map.shape[axis] for feature_map in feature_maps]) for axis in (2, 3))
        projected = []
        for feature_map, projection in zip(feature_maps, self.projections, strict=True):
            hidden = projection(feature_map.movedim(1, -1)).movedim(-1, 1)  # (batch, hidden, height_k, width_k)
            projected.append(resize_map(hidden, size))
        fused = self.fuse(torch.cat(projected[::-1], dim=1))  # (batch, hidden, height, width)
        return self.classifier(self.dropout(self.norm(fused, valid).relu()))

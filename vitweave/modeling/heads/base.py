"""What the heads share: one constructor, and maps brought to one size."""

import torch.nn.functional as F
from torch import Tensor, nn


class SegmentationHead(nn.Module):
    """Feature maps to one score per class and position.

    A head takes `(in_channels, num_labels, **its own options)`, `in_channels` having one entry per map, and maps a list
    of maps (batch, channels_k, height_k, width_k) to logits (batch, num_labels, height, width).
    """

    def reset_parameters(self) -> None:
        """Set the initial weights; only with `transformers.initialization`, so that loaded weights are kept."""
        raise NotImplementedError

    def forward(self, feature_maps: list[Tensor]) -> Tensor:
        raise NotImplementedError


def resize_map(feature_map: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map (batch, channels, height, width) bilinearly to `size` = (height, width)."""
    if feature_map.shape[-2:] == size:
        return feature_map
    return F.interpolate(feature_map, size=size, mode="bilinear", align_corners=False)

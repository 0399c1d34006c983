"""What the heads share: one constructor per task, their layers, and maps brought to one size."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

DEPTH_TARGETS = ("metres", "disparity")


class SegmentationHead(nn.Module):
    """Feature maps to one score per class and position.

    A head takes `(in_channels, num_labels, **its own options)`, `in_channels` having one entry per map, and maps a list
    of maps (batch, channels_k, height_k, width_k) to logits (batch, num_labels, height, width).
    """

    def forward(self, feature_maps: list[Tensor]) -> Tensor:
        raise NotImplementedError


class DepthHead(nn.Module):
    """Feature maps, and for some the class tokens, to one value per position.

    A head takes `(in_channels, **its own options)`, `in_channels` having one entry per map, and the range:

    - `depth_target="metres"`: values in [min_depth, max_depth];
    - `depth_target="disparity"`: relative inverse depth, >= 0, larger is nearer; its scale and shift mean nothing.
    """

    reads_class_tokens = False

    def __init__(self, depth_target: str = "metres", min_depth: float = 0.001, max_depth: float = 10.0):
        super().__init__()
        if depth_target not in DEPTH_TARGETS:
            raise ValueError(f"unknown depth_target {depth_target!r}; known: {sorted(DEPTH_TARGETS)}")
        if not 0 < min_depth < max_depth < float("inf"):
            raise ValueError(
                f"expected 0 < min_depth < max_depth in metres, got {min_depth} and {max_depth}; NYU: 0.001 and 10,"
                " KITTI: 0.001 and 80"
            )
        self.depth_target, self.min_depth, self.max_depth = depth_target, min_depth, max_depth

    def forward(self, feature_maps: list[Tensor], class_tokens: list[Tensor] | None = None) -> Tensor:
        """Maps (batch, channels_k, height_k, width_k), shallow to deep, to values (batch, 1, height, width).

        Args:
            class_tokens: one (batch, channels_k) per map, where `reads_class_tokens`.
        """
        raise NotImplementedError

    def to_value(self, score: Tensor) -> Tensor:
        """A free score to a value in range.

        Metres through a sigmoid, as in the metric models of Depth Anything (arXiv:2406.09414). Disparity through a
        softplus: the ReLU of DPT stops learning for good where all pixels start below zero.
        """
        if self.depth_target == "disparity":
            return F.softplus(score)
        return self.min_depth + (self.max_depth - self.min_depth) * score.sigmoid()


class ProbeConv(nn.Conv2d):
    """1x1 convolution with weights from N(0, 0.01) and no bias at the start, as in DINOv2's linear probes.

    A class of its own because transformers initialises out-of-tree models leaf by leaf: what a module around this one
    does in `_init_weights` is skipped. `set_start_values` is called by the constructor and by `_init_weights`.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=1)

    def reset_parameters(self) -> None:
        self.set_start_values()

    def set_start_values(self) -> None:
        """Weights from N(0, 0.01), bias zero."""
        init.normal_(self.weight, std=0.01)  # unlike torch's own, leaves loaded weights as they are
        init.zeros_(self.bias)


class DeepConv(nn.Conv2d):
    """Convolution that starts as torch's own does: over a dozen layers the N(0, 0.02) of transformers fades to nothing.

    `set_start_values` as in `ProbeConv`.
    """

    def reset_parameters(self) -> None:
        self.set_start_values()

    def set_start_values(self) -> None:
        """Torch's own scale."""
        start_like_torch(self)


class DeepConvTranspose(nn.ConvTranspose2d):
    """The same for a transposed convolution."""

    def reset_parameters(self) -> None:
        self.set_start_values()

    def set_start_values(self) -> None:
        """Torch's own scale."""
        start_like_torch(self)


def start_like_torch(layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Uniform weights of torch's own scale, and no bias; loaded weights stay as they are."""
    init.kaiming_uniform_(layer.weight, a=5**0.5)
    if layer.bias is not None:
        init.zeros_(layer.bias)


def resize_map(feature_map: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map (batch, channels, height, width) bilinearly to `size` = (height, width)."""
    if feature_map.shape[-2:] == size:
        return feature_map
    return F.interpolate(feature_map, size=size, mode="bilinear", align_corners=False)

"""What the depth heads share: what their values mean, and how a score becomes one."""

import torch.nn.functional as F
from torch import Tensor, nn

DEPTH_TARGETS = ("metres", "disparity")


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

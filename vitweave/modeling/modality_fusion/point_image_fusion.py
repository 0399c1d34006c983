"""GeminiFusion of points and the image pixels that they fall on, for 3D detectors."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.modality_fusion.base import BlockInputs
from vitweave.modeling.modality_fusion.registry import build_modality_fusion
from vitweave.modeling.start_values import start_as_in_torch


class PointImageFusion(nn.Module):
    """Point features that have seen the image, as GeminiFusion (arXiv:2406.01210) adds it to MVX-Net on KITTI.

    Every level of an image pyramid passes a 3x3 convolution and is read at the projected points; levels side by side
    and point features are brought to one width, each by a Linear and a BatchNorm (eps 1e-3), and fuse per point; the
    output is the ReLU of both streams' average with trained weights. It replaces `ReLU(image + points)`.

    By default the fusion inside starts as the identity, so the module starts as that addition (halved).

    Args:
        in_channels: of every level of the pyramid.
        point_channels: of the point features.
        hidden_size: of the output.
        num_heads, start: of the fusion.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        point_channels: int,
        hidden_size: int,
        *,
        num_heads: int = 8,
        start: str = "identity",
    ):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(channels, hidden_size, 3, padding=1) for channels in in_channels)
        self.image_proj = nn.Linear(len(self.laterals) * hidden_size, hidden_size)
        self.image_norm = nn.BatchNorm1d(hidden_size, eps=1e-3)
        self.point_proj = nn.Linear(point_channels, hidden_size)
        self.point_norm = nn.BatchNorm1d(hidden_size, eps=1e-3)
        self.fusion = build_modality_fusion("gemini", 2, hidden_size, {"num_heads": num_heads, "start": start})
        self.stream_logits = nn.Parameter(torch.empty(2))  # image, points
        self.set_start_values()

    def set_start_values(self) -> None:
        """Layers as torch starts them; both streams count equally."""
        for part in (self.laterals, self.image_proj, self.point_proj):
            start_as_in_torch(part)
        init.ones_(self.stream_logits)

    def forward(
        self,
        points: Tensor,
        pyramid: Sequence[Tensor],
        uv: Tensor,
        image_index: Tensor,
        image_size: tuple[int, int],
    ) -> Tensor:
        """
        Args:
            points: (points, channels), the features of all points of the batch.
            pyramid: (batch, channels_k, height_k, width_k) of every level.
            uv: (points, 2), columns and rows in pixels of the padded image; outside of it the image reads as zero.
            image_index: (points,), the image of the batch that a point belongs to.
            image_size: (height, width) of the padded images.

        Returns:
            (points, hidden).
        """
        if len(pyramid) != len(self.laterals):
            raise ValueError(f"expected a pyramid of {len(self.laterals)} levels, got {len(pyramid)}")
        image = self.image_norm(self.image_proj(self.read_pyramid(pyramid, uv, image_index, image_size)))
        streams = torch.stack([image, self.point_norm(self.point_proj(points))]).unsqueeze(1)
        fused, _ = self.fusion(streams, BlockInputs(residual=streams, grid=(1, streams.shape[2])))
        weights = self.stream_logits.softmax(dim=0)
        return F.relu(torch.einsum("m,mbnc->bnc", weights, fused)).squeeze(0)

    def read_pyramid(
        self, pyramid: Sequence[Tensor], uv: Tensor, image_index: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        """(points, levels * hidden)."""
        places = uv / uv.new_tensor([image_size[1], image_size[0]])
        levels = zip(self.laterals, pyramid, strict=True)
        return torch.cat([sample_points(conv(level), places, image_index) for conv, level in levels], dim=1)


def sample_points(feature_map: Tensor, places: Tensor, image_index: Tensor) -> Tensor:
    """Bilinear reading of a batch of maps at single points, zero outside.

    Unlike `grid_sample` it takes any number of points per image, in any order. Places are parts of the whole map, so
    that cell centres lie at (column + 0.5) / width.

    Args:
        feature_map: (batch, channels, height, width).
        places: (points, 2), column and row in [0, 1] inside; NaN counts as outside.
        image_index: (points,), which map.

    Returns:
        (points, channels).
    """
    height, width = feature_map.shape[-2:]
    places = places.nan_to_num(nan=-1.0) * places.new_tensor([width, height]) - 0.5
    places = places.clamp(min=-2, max=max(height, width) + 1)  # far outside is outside, and fits an integer
    first = places.floor()
    steps = places.new_tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
    corners = first.unsqueeze(1) + steps  # (points, 4, 2)
    weights = (1 - (places.unsqueeze(1) - corners).abs()).prod(dim=-1)
    columns, rows = corners.long().unbind(dim=-1)
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    cells = (image_index.unsqueeze(1) * height + rows.clamp(0, height - 1)) * width + columns.clamp(0, width - 1)
    values = feature_map.permute(0, 2, 3, 1).flatten(0, 2)[cells]  # (points, 4, channels)
    values = values.masked_fill(~inside.unsqueeze(-1), 0)
    return (weights.to(values.dtype).unsqueeze(-1) * values).sum(dim=1)


def project_points(points: Tensor, to_image: Tensor) -> Tensor:
    """Pixels (points, 2), column and row, of points (points, 3) by a projection (4, 4) or one per point (points, 4, 4).

    Points behind the camera land far outside of the image or at its mirrored place; mask them by their depth.
    """
    homogeneous = F.pad(points, (0, 1), value=1.0)
    projected = (to_image @ homogeneous.unsqueeze(-1)).squeeze(-1)
    return projected[:, :2] / projected[:, 2:3].clamp(min=1e-5)

"""Tokens of the first encoder sample the maps of the others where they choose."""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.configuration.encoder_fusion_plans import Grid, plan_deformable
from vitweave.modeling.encoder_fusion.base import EncoderFusion, EncoderMaps
from vitweave.modeling.grid_matching import map_to_tokens
from vitweave.modeling.layer_fusion.base import ZeroLinear
from vitweave.modeling.tokens import tokens_to_map


class OffsetLinear(nn.Linear):
    """Offsets of the sampling points, in cells: zero weights, and a bias that puts the points of each head on a ray.

    The rays of the heads point all around, and point k lies k cells away (arXiv:2010.04159).
    """

    def __init__(self, hidden_size: int, num_heads: int, num_maps: int, num_points: int):
        self.shape = (num_heads, num_maps, num_points, 2)
        super().__init__(hidden_size, math.prod(self.shape))

    def reset_parameters(self) -> None:
        self.set_start_values()

    def set_start_values(self) -> None:
        """Weights zero, bias the rays."""
        num_heads, _, num_points, _ = self.shape
        angles = torch.arange(num_heads) * (2 * math.pi / num_heads)
        rays = torch.stack([angles.cos(), angles.sin()], dim=-1)
        rays = rays / rays.abs().amax(dim=-1, keepdim=True)  # on the square of cells around the query
        points = rays[:, None, None] * torch.arange(1, num_points + 1)[:, None]  # (heads, 1, points, 2)
        init.zeros_(self.weight)
        init.copy_(self.bias, points.expand(self.shape).flatten())


class DeformableFusion(EncoderFusion):
    """Deformable attention of the first encoder's tokens to the maps of the others.

    EAGLE (arXiv:2408.15998) names the fusion and gives no formula; its numbers are defined here, after Deformable DETR
    (arXiv:2010.04159). For a query q at the normalised centre p of its cell, with heads m, maps j and points k:

        out = q + out_proj(concat_m sum_jk A_mjk bilinear(value_j^m, p + D_mjk / [width_j, height_j]))

    D = offsets(q) in cells, A the softmax of scores(q) over maps and points together; what lies outside a map is zero.
    All maps but the first are sampled. Offsets start as rings, scores at zero, as in Deformable DETR; out_proj starts
    at zero, too, so that a fresh tower gives what its first encoder gives. Where `hidden_size` is not the first
    encoder's width, its tokens go through a Linear layer first. Places and samples are computed in float32 at least.

    Args:
        num_heads: must divide the hidden size.
        num_points: per head and map.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        grids: Sequence[Grid],
        hidden_size: int | None = None,
        *,
        num_heads: int = 8,
        num_points: int = 4,
    ):
        options = {"num_heads": num_heads, "num_points": num_points}
        super().__init__(partial(plan_deformable, in_channels, hidden_size=hidden_size, **options), grids)
        width, num_maps = self.hidden_size, len(in_channels) - 1
        self.num_heads, self.shape = num_heads, (num_heads, num_maps, num_points)
        self.query_proj = nn.Identity() if in_channels[0] == width else nn.Linear(in_channels[0], width)
        self.value_projs = nn.ModuleList(nn.Linear(channels, width) for channels in in_channels[1:])
        self.offsets = OffsetLinear(width, num_heads, num_maps, num_points)
        self.scores = ZeroLinear(width, num_heads * num_maps * num_points)
        self.out_proj = ZeroLinear(width, width)

    def forward(self, features: EncoderMaps) -> Tensor:
        base, *others = features.maps
        queries = self.query_proj(map_to_tokens(base))  # (batch, tokens, hidden)
        precision = torch.promote_types(queries.dtype, torch.float32)
        offsets = self.offsets(queries).to(precision).unflatten(-1, self.offsets.shape)
        weights = self.scores(queries).to(precision).unflatten(-1, (self.num_heads, -1)).softmax(dim=-1)
        weights = weights.unflatten(-1, self.shape[1:])  # (batch, tokens, heads, maps, points)
        columns, rows = cell_centres(base.shape[-2:], offsets)  # (tokens, 1, 1)
        context = torch.zeros_like(queries, dtype=precision)
        for index, (projection, feature_map) in enumerate(zip(self.value_projs, others, strict=True)):
            height, width = feature_map.shape[-2:]
            values = tokens_to_map(projection(map_to_tokens(feature_map)), (height, width)).to(precision)
            across, down = offsets[:, :, :, index].unbind(-1)  # (batch, tokens, heads, points)
            places = torch.stack([columns + across / width, rows + down / height], dim=-1)
            context = context + self.sample(values, places, weights[:, :, :, index])
        return queries + self.out_proj(context.to(queries.dtype))

    def sample(self, values: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of a map at the places of every head.

        Args:
            values: (batch, hidden, height, width).
            places: (batch, tokens, heads, points, 2), x and y from 0 to 1.
            weights: (batch, tokens, heads, points).

        Returns:
            (batch, tokens, hidden).
        """
        by_head = values.unflatten(1, (self.num_heads, -1)).flatten(0, 1)  # (batch * heads, channels, height, width)
        places = places.transpose(1, 2).flatten(0, 1) * 2 - 1
        sampled = F.grid_sample(by_head, places, mode="bilinear", padding_mode="zeros", align_corners=False)
        summed = torch.einsum("bcnk,bnk->bnc", sampled, weights.transpose(1, 2).flatten(0, 1))
        return summed.unflatten(0, (-1, self.num_heads)).transpose(1, 2).flatten(2)


def cell_centres(grid: Grid, like: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of the centre of every cell from 0 to 1, row by row, (cells, 1, 1) each."""
    down, across = ((torch.arange(side, device=like.device, dtype=like.dtype) + 0.5) / side for side in grid)
    rows, columns = torch.meshgrid(down, across, indexing="ij")
    return columns.flatten()[:, None, None], rows.flatten()[:, None, None]

"""Learnt queries on a grid that read their own window of every encoder's map."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.configuration.encoder_fusion_plans import Grid, cells, plan_spatial_vision_aggregator, sva_grids
from vitweave.modeling.encoder_fusion.base import EncoderFusion, EncoderMaps
from vitweave.modeling.grid_matching import bilinear
from vitweave.modeling.sva_layers import SpatialVisionSampler, cut_windows
from vitweave.modeling.visible_tokens import visible_cells


class EncoderProjection(nn.Module):
    """`norm(fc2(gelu(fc1(x))))`, from the channels of one encoder to the common width."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.fc1 = nn.Linear(in_features, out_features)
        self.fc2 = nn.Linear(out_features, out_features)
        self.norm = nn.LayerNorm(out_features)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.norm(self.fc2(F.gelu(self.fc1(hidden_states))))


class SpatialVisionAggregatorFusion(EncoderFusion):
    """The spatial vision aggregator of Cambrian-1 (arXiv:2406.16860), as its released code computes it.

    Every map is projected to `vision_hidden_size`. Each query group is one learnt vector at every cell of its grid; its
    layers attend from each cell to the windows of all maps that cover it, with the mean of the first map as context.
    The groups are resized to the final grid and concatenated. With `image_sizes`, cells that show only padding are not
    attended to; a window without any visible cell is read whole. What the released code does between the layers of its
    language model is `SpatialVisionSampler` with the language model's width as `query_size`; newlines are
    `add_newlines`.

    Windows keep their size, which their position embeddings have. So images of another size get another number of
    queries where neither `query_sides` nor `tower_sides` are given; otherwise their maps are resized, bilinear, to the
    grids the fusion was built for.

    The weights of released checkpoints want `tower_sides=[24, 24, 24, 96]`, and the defaults.

    Args:
        in_channels, grids, hidden_size: as in every fusion; the output is as wide as all query groups together.
        query_sides: side, or height and width, of the grid of each query group; None for one group on the coarsest map.
        final_side: of the output; None for that of the finest query group.
        tower_sides: what each map is resized to first; None for the grids the encoders have.
        vision_hidden_size: width of queries, keys and values.
        depth: layers of each query group.
        num_heads: of the attention.
        layer_type: "joint" for one attention to all maps, "sep" for one each and a weighted sum.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        grids: Sequence[Grid],
        hidden_size: int | None = None,
        *,
        query_sides: Sequence[int | Sequence[int]] | None = None,
        final_side: int | Sequence[int] | None = None,
        tower_sides: Sequence[int | Sequence[int]] | None = None,
        vision_hidden_size: int = 1024,
        depth: int = 3,
        num_heads: int = 16,
        layer_type: str = "joint",
    ):
        map_grids, queries, _ = sva_grids(grids, query_sides, final_side, tower_sides)
        fixed = map_grids if query_sides is not None else tower_sides
        self.sides = {"query_sides": query_sides, "final_side": final_side, "tower_sides": fixed}
        sizes = {"vision_hidden_size": vision_hidden_size, "hidden_size": hidden_size}
        super().__init__(partial(plan_spatial_vision_aggregator, in_channels, **sizes, **self.sides), grids)
        if depth < 1:
            raise ValueError(f"expected at least one layer, got depth={depth}")
        if num_heads < 1 or vision_hidden_size % num_heads:
            raise ValueError(f"expected num_heads to divide vision_hidden_size={vision_hidden_size}, got {num_heads}")
        # of the first query group, height and width on each map
        self.windows = [(grid[0] // queries[0][0], grid[1] // queries[0][1]) for grid in map_grids]
        width = vision_hidden_size
        self.projections = nn.ModuleList(EncoderProjection(channels, width) for channels in in_channels)
        self.query = nn.Parameter(torch.empty(len(queries), width))
        in_features = [width] * len(map_grids)
        self.samplers = nn.ModuleList(
            SpatialVisionSampler(depth, width, width, in_features, num_cells, width, num_heads, layer_type)
            for num_cells in ([cells(grid) // cells(query) for grid in map_grids] for query in queries)
        )
        self.set_start_values()

    def set_start_values(self) -> None:
        """Queries of unit length on average."""
        init.normal_(self.query, std=self.query.shape[1] ** -0.5)

    def forward(self, features: EncoderMaps) -> Tensor:
        seen = [(part.shape[-2], part.shape[-1]) for part in features.maps]
        _, queries, final = sva_grids(seen, **self.sides)
        grids = [(queries[0][0] * high, queries[0][1] * wide) for high, wide in self.windows]
        states = [
            projection(bilinear(feature_map, grid).permute(0, 2, 3, 1))  # (batch, height, width, hidden)
            for projection, feature_map, grid in zip(self.projections, features.maps, grids, strict=True)
        ]
        context = states[0].flatten(1, 2).mean(dim=1, keepdim=True)
        visible = None if features.image_sizes is None else visible_maps(features.image_sizes, grids)
        groups = [
            bilinear(self.aggregate(sampler, query, grid, states, context, visible), final)
            for sampler, query, grid in zip(self.samplers, self.query.unbind(0), queries, strict=True)
        ]
        return torch.cat(groups, dim=1).flatten(2).transpose(1, 2)  # (batch, tokens, hidden)

    def aggregate(
        self,
        sampler: SpatialVisionSampler,
        query: Tensor,
        grid: Grid,
        states: list[Tensor],
        context: Tensor,
        visible: list[Tensor] | None,
    ) -> Tensor:
        """(batch, hidden, height, width) of one query group on its own grid."""
        windows = [cut_windows(part, grid) for part in states]
        mask = None
        if visible is not None:
            masks = [cut_windows(part, grid).squeeze(-1) for part in visible]
            mask = torch.cat([part | ~part.any(dim=-1, keepdim=True) for part in masks], dim=-1)
        start = query.expand(context.shape[0], 1, -1)  # the same at every position until the first layer has run
        tokens = sampler(start, context, windows, mask)  # (batch, positions, hidden)
        return tokens.transpose(1, 2).unflatten(2, grid)


def visible_maps(image_sizes: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """Of each map (batch, height, width, 1), True where a cell shows the image."""
    for height, width in grids:
        if height != width:
            raise ValueError(
                f"image_sizes say how images were padded to squares, but a map has {height}x{width} cells; leave"
                " image_sizes out"
            )
    return [visible_cells(image_sizes, grid[0]).unsqueeze(-1) for grid in grids]

"""Channels of all encoders side by side."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from vitweave.configuration.encoder_fusion_plans import Grid, common_grid, plan_channel_concat
from vitweave.modeling.encoder_fusion.base import EncoderFusion, EncoderMaps
from vitweave.modeling.grid_matching import RESIZES, map_to_tokens
from vitweave.modeling.projectors import build_projector


class ChannelConcatFusion(EncoderFusion):
    """All maps on one grid, their channels concatenated in the order of the encoders (EAGLE, arXiv:2408.15998).

    EAGLE's towers meet at 32x32 cells by `bilinear_ac`, the SAM tower after an unshuffling by 2 (an option of the
    encoder). Its projector belongs to the language model. Here one is added only where it is asked for by name or by a
    `hidden_size` that is not the sum of all channels.

    Args:
        grid: a side, or (height, width); None is the grid of the first encoder.
        resize: see `RESIZES`.
        projector: see `PROJECTORS`; None is "mlp2x_gelu" where the width changes, and nothing elsewhere.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        grids: Sequence[Grid],
        hidden_size: int | None = None,
        *,
        grid: int | Sequence[int] | None = None,
        resize: str = "bilinear_ac",
        projector: str | None = None,
    ):
        options = {"grid": grid, "resize": resize, "projector": projector}
        super().__init__(partial(plan_channel_concat, in_channels, hidden_size=hidden_size, **options), grids)
        self.grid, self.resize = grid, RESIZES[resize]
        if projector is None:
            projector = "identity" if self.hidden_size == sum(in_channels) else "mlp2x_gelu"
        self.projector = build_projector(projector, sum(in_channels), self.hidden_size)

    def forward(self, features: EncoderMaps) -> Tensor:
        grid = common_grid([tuple(features.maps[0].shape[-2:])], self.grid)
        tokens = [map_to_tokens(self.resize(feature_map, grid)) for feature_map in features.maps]
        return self.projector(torch.cat(tokens, dim=2))  # (batch, tokens, channels of all) -> (batch, tokens, hidden)

"""The sum of all encoders on the grid of the first."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from vitweave.configuration.encoder_fusion_plans import Grid, plan_add
from vitweave.modeling.encoder_fusion.base import EncoderFusion, EncoderMaps
from vitweave.modeling.grid_matching import RESIZES, map_to_tokens
from vitweave.modeling.layer_fusion.base import ZeroLinear


class AddFusion(EncoderFusion):
    """`x_0 + sum_k proj_k(resize(x_k))`: the tokens of the first encoder, corrected by the others.

    The form is defined here; it is no paper's. The projections start at zero, so that a fresh tower gives what its
    first encoder gives, bit for bit; the other encoders get gradients as soon as the projections have moved. Where
    `hidden_size` is not the first encoder's width, its tokens go through a Linear layer, too, with ordinary start
    values.

    Args:
        resize: see `RESIZES`.
        direct: the projections start as Linear layers do, and all encoders count from the first step on.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        grids: Sequence[Grid],
        hidden_size: int | None = None,
        *,
        resize: str = "bilinear_ac",
        direct: bool = False,
    ):
        options = {"resize": resize, "direct": direct}
        super().__init__(partial(plan_add, in_channels, hidden_size=hidden_size, **options), grids)
        self.resize = RESIZES[resize]
        first, kind = in_channels[0], nn.Linear if direct else ZeroLinear
        self.base_proj = nn.Identity() if first == self.hidden_size else nn.Linear(first, self.hidden_size)
        self.projs = nn.ModuleList(kind(channels, self.hidden_size) for channels in in_channels[1:])

    def forward(self, features: EncoderMaps) -> Tensor:
        base, *others = features.maps
        fused, grid = self.base_proj(map_to_tokens(base)), tuple(base.shape[-2:])
        for projection, feature_map in zip(self.projs, others, strict=True):
            fused = fused + projection(map_to_tokens(self.resize(feature_map, grid)))  # (batch, tokens, hidden)
        return fused

"""Atrous spatial pyramid pooling over the patch grid."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitweave.modeling.layer_fusion.base import FusedTokens, LayerFusion, LayerTokens, check_choice
from vitweave.modeling.masked_maps import MaskedBatchNorm, group_norm, mask_to_map, masked_mean, zero_masked
from vitweave.modeling.tokens import tokens_to_map

MAP_NORMS = ("group", "batch")


class AsppFusion(LayerFusion):
    """Concatenated layers through atrous spatial pyramid pooling (DeepLabv3, arXiv:1706.05587).

    `X = conv1x1 [P_1; ...; P_L]`, `Y = ASPP(X)`; the patches get `Y`, the embedding `W mean(Y) + b`.
    GroupNorm stands where DeepLab has BatchNorm: retrieval trains with small batches. A rate must be smaller than the
    grid (14x14: 2, 4, 6; 32x32: 6, 12, 18): a 3x3 kernel dilated further meets only its centre (`check_grid`).

    Args:
        rates: one dilated 3x3 convolution each, beside the 1x1 convolution and the image pooling.
        reduced_channels: channels of X.
        mid_channels: channels of each branch.
        map_norm: "group" or DeepLab's "batch", which the papers' weights need.
        norm_groups: groups of GroupNorm; None takes 32, or fewer where 32 leaves less than two channels per group.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        rates: Sequence[int] = (2, 4, 6),
        reduced_channels: int = 256,
        mid_channels: int = 128,
        map_norm: str = "group",
        norm_groups: int | None = None,
        norm: str = "per_layer",
        direct: bool = False,
    ):
        super().__init__(
            num_layers, hidden_size, needs=("patches",), residuals=("global", "patch"), norm=norm, direct=direct
        )
        self.reduce = nn.Conv2d(num_layers * hidden_size, reduced_channels, kernel_size=1)
        self.aspp = Aspp(reduced_channels, mid_channels, hidden_size, rates, map_norm, norm_groups)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Warn of rates that reach beyond a grid of (height, width), and name the largest useful one."""
        largest = max(max(grid) - 1, 1)
        useless = [rate for rate in self.aspp.rates if rate > largest]
        if useless:
            warnings.warn(
                f"the ASPP rates {useless} reach beyond a grid of {grid[0]}x{grid[1]} patches, so their 3x3 kernels"
                f" meet only their centre; the largest useful rate is {largest}",
                stacklevel=2,
            )

    def forward(self, tokens: LayerTokens, output_attentions: bool = False) -> FusedTokens:
        stacked = self.normed_patches(tokens).transpose(1, 2).flatten(2)  # (batch, patches, layers * hidden)
        mask = mask_to_map(tokens.patch_mask, tokens.grid)
        reduced = self.reduce(tokens_to_map(stacked, tokens.grid))
        context = self.aspp(zero_masked(reduced, mask), mask)
        pooled = self.proj(masked_mean(context, mask).flatten(1))
        return FusedTokens(
            pooled=self.residual("global", tokens.base_cls, pooled),
            patches=self.residual("patch", tokens.base_patches, context.flatten(2).transpose(1, 2)),
        )


class Aspp(nn.Module):
    """1x1, dilated 3x3 and image-pooling branches side by side, concatenated and projected by a 1x1 convolution."""

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        rates: Sequence[int],
        map_norm: str = "group",
        norm_groups: int | None = None,
    ):
        super().__init__()
        check_choice("map_norm", map_norm, MAP_NORMS)
        if any(rate < 1 for rate in rates):
            raise ValueError(f"expected rates of 1 or more, got {list(rates)}")
        if map_norm == "batch" and norm_groups is not None:
            raise ValueError(f"map_norm='batch' has no groups, got norm_groups={norm_groups}")
        norms = {"group": lambda channels: group_norm(channels, norm_groups), "batch": MaskedBatchNorm}
        make_norm = norms[map_norm]
        self.rates = tuple(rates)
        convs = [nn.Conv2d(in_channels, mid_channels, 1, bias=False)]
        convs += [nn.Conv2d(in_channels, mid_channels, 3, padding=r, dilation=r, bias=False) for r in rates]
        self.branches = nn.ModuleList(ConvNormRelu(conv, make_norm(mid_channels)) for conv in convs)
        pooling = nn.Conv2d(in_channels, mid_channels, 1, bias=False)
        self.pooling = ConvNormRelu(pooling, make_norm(mid_channels))
        project = nn.Conv2d((len(convs) + 1) * mid_channels, out_channels, 1, bias=False)
        self.project = ConvNormRelu(project, make_norm(out_channels))

    def forward(self, maps: Tensor, mask: Tensor | None = None) -> Tensor:
        """(batch, in_channels, height, width), zero where masked, to (batch, out_channels, height, width)."""
        context = [branch(maps, mask) for branch in self.branches]
        pooled = self.pooling(masked_mean(maps, mask), None)  # (batch, mid_channels, 1, 1)
        context.append(pooled.expand(-1, -1, *maps.shape[-2:]))
        return zero_masked(self.project(torch.cat(context, dim=1), mask), mask)


class ConvNormRelu(nn.Module):
    """Convolution, norm over the valid positions, relu."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, maps: Tensor, mask: Tensor | None) -> Tensor:
        return self.norm(self.conv(maps), mask).relu()

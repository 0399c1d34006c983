"""Attention over the patch grid at linear cost: efficient multi-scale attention, or linear attention."""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.layer_fusion.base import FusedTokens, LayerFusion, LayerTokens, check_choice
from vitweave.modeling.layer_fusion.base_attention import check_heads, join_heads, split_heads
from vitweave.modeling.masked_maps import MaskedGroupNorm, mask_to_map, masked_mean, zero_masked
from vitweave.modeling.tokens import tokens_to_map

ATTENTIONS = ("ema", "linear")


class EfficientAttentionFusion(LayerFusion):
    """Softmax-weighted sum of the layers' patches, then attention over the grid.

    `X = sum_l softmax(layer_logits)_l P_l`, `Y = attention(X)`; the patches get `Y`, the embedding `W mean(Y) + b`.

    "ema": the channel-grouped spatial gate of arXiv:2305.13563 (efficient multi-scale attention; nothing to do with
    exponential moving averages). Its gate starts near 1/2; the direct form doubles it, so that it starts near the
    identity. "linear": `X + W_o softmax_channels(Q) (softmax_patches(K)^T V)` (efficient attention, arXiv:1812.01243).

    Args:
        groups: channel groups of "ema", a divisor of the hidden size; None takes the published 32, or the largest
            power of two below it that divides the hidden size.
        num_heads: heads of "linear"; None takes one per 64 channels.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        attention: str = "ema",
        groups: int | None = None,
        num_heads: int | None = None,
        norm: str = "per_layer",
        direct: bool = False,
    ):
        super().__init__(
            num_layers, hidden_size, needs=("patches",), residuals=("global", "patch"), norm=norm, direct=direct
        )
        check_choice("attention", attention, ATTENTIONS)
        unused = {"ema": ("num_heads", num_heads), "linear": ("groups", groups)}[attention]
        if unused[1] is not None:
            raise ValueError(f"attention={attention!r} has no {unused[0]}, got {unused[0]}={unused[1]}")
        self.layer_logits = nn.Parameter(torch.empty(num_layers))
        if attention == "ema":
            groups = math.gcd(hidden_size, 32) if groups is None else groups
            self.attention = MultiScaleAttention(hidden_size, groups, gain=2.0 if direct else 1.0)
        else:
            self.attention = LinearAttention(hidden_size, check_heads(hidden_size, num_heads))
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.set_start_values()

    def set_start_values(self) -> None:
        super().set_start_values()
        init.zeros_(self.layer_logits)  # all layers count equally

    def forward(self, tokens: LayerTokens, output_attentions: bool = False) -> FusedTokens:
        weights = self.layer_logits.softmax(dim=0)  # (layers,)
        mixed = torch.einsum("l,blnc->bnc", weights, self.normed_patches(tokens))
        mask = mask_to_map(tokens.patch_mask, tokens.grid)
        attended = self.attention(zero_masked(tokens_to_map(mixed, tokens.grid), mask), mask)
        pooled = self.proj(masked_mean(attended, mask).flatten(1))
        return FusedTokens(
            pooled=self.residual("global", tokens.base_cls, pooled),
            patches=self.residual("patch", tokens.base_patches, attended.flatten(2).transpose(1, 2)),
            layer_weights=weights,
        )


class MultiScaleAttention(nn.Module):
    """EMA (arXiv:2305.13563): `x * gain * sigmoid(m)`, one map m per group of channels, weights shared by the groups.

    Row and column means pass one 1x1 convolution and gate x; the gated x (instance-normed) and a 3x3 convolution of x
    weigh each other's channels by the softmax of their means, and the two weighted sums make m. Instance norm of a
    single position is 0/0, so grids of one patch are refused.
    """

    def __init__(self, channels: int, groups: int, gain: float = 1.0):
        super().__init__()
        if groups < 1 or channels % groups:
            raise ValueError(f"expected groups to divide hidden_size={channels}, got {groups}")
        width = channels // groups
        self.groups, self.gain = groups, gain
        self.conv1x1 = nn.Conv2d(width, width, kernel_size=1)
        self.conv3x3 = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.norm = MaskedGroupNorm(width, width)

    def forward(self, maps: Tensor, mask: Tensor | None) -> Tensor:
        """(batch, channels, height, width), zero where masked, to a map of that shape, zero where masked."""
        height, width = maps.shape[-2:]
        if height * width == 1:
            raise ValueError("efficient multi-scale attention needs a grid of at least two patches, got 1x1")
        grouped = maps.unflatten(1, (self.groups, -1)).flatten(0, 1)  # (batch * groups, channels / groups, ...)
        mask = None if mask is None else mask.repeat_interleave(self.groups, 0)
        rows, columns = masked_mean(grouped, mask, dim=(3,)), masked_mean(grouped, mask, dim=(2,))
        strips = self.conv1x1(torch.cat((rows, columns.transpose(2, 3)), dim=2))  # (..., height + width, 1)
        rows, columns = strips.sigmoid().split((height, width), dim=2)
        gated = self.norm(grouped * rows * columns.transpose(2, 3), mask)
        local = self.conv3x3(grouped)
        weights = [masked_mean(branch, mask).softmax(dim=1) for branch in (gated, local)]
        crossed = torch.einsum("bchw,bcij->bhw", torch.cat((local, gated), 1), torch.cat(weights, 1)).unsqueeze(1)
        attended = grouped * (self.gain * crossed.sigmoid())
        return attended.unflatten(0, (-1, self.groups)).flatten(1, 2)


class LinearAttention(nn.Module):
    """Efficient attention (arXiv:1812.01243): `softmax_channels(Q) (softmax_patches(K)^T V)` per head, plus the input.

    The (channels x channels) context costs O(patches), not O(patches^2). Masked patches get no weight.
    """

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, maps: Tensor, mask: Tensor | None) -> Tensor:
        """(batch, channels, height, width), zero where masked, to a map of that shape, zero where masked."""
        patches = maps.flatten(2).transpose(1, 2)  # (batch, patches, channels)
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(patches).chunk(3, dim=2))
        if mask is not None:
            key = key.masked_fill(~mask.flatten(1)[:, None, :, None], torch.finfo(key.dtype).min)
        context = key.softmax(dim=2).transpose(2, 3) @ value  # (batch, heads, channels / heads, channels / heads)
        attended = self.out_proj(join_heads(query.softmax(dim=3) @ context))
        return zero_masked((patches + attended).transpose(1, 2).view_as(maps), mask)

"""Streams correct each other by gates, and are fused by attention over channels (CMX)."""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.modality_fusion.base import BlockInputs, ModalityFusion, ModalityNorm
from vitweave.modeling.modality_layers import ModalityLinear, has_company
from vitweave.modeling.tokens import tokens_to_map

FUSE = ("add", "map", "none")


class RectifyGates(nn.Module):
    """How much of each stream of a pair the other one takes: a gate per channel and a gate per place.

    Args:
        start_gate: what all gates start near, in (0, 1).
    """

    def __init__(self, hidden_size: int, reduction: int, lambda_c: float, lambda_s: float, start_gate: float):
        super().__init__()
        self.lambda_c, self.lambda_s, self.start_gate = lambda_c, lambda_s, start_gate
        self.channel_fc1 = nn.Linear(4 * hidden_size, 4 * hidden_size // reduction)
        self.channel_fc2 = nn.Linear(4 * hidden_size // reduction, 2 * hidden_size)
        self.spatial_fc1 = nn.Linear(2 * hidden_size, hidden_size // reduction)
        self.spatial_fc2 = nn.Linear(hidden_size // reduction, 2)
        self.set_start_values()

    def set_start_values(self) -> None:
        for layer in (self.channel_fc1, self.channel_fc2, self.spatial_fc1, self.spatial_fc2):
            init.trunc_normal_(layer.weight, std=0.02, a=-0.04, b=0.04)
            init.zeros_(layer.bias)
        for layer in (self.channel_fc2, self.spatial_fc2):
            init.constant_(layer.bias, math.log(self.start_gate / (1 - self.start_gate)))

    def forward(self, pairs: Tensor) -> Tensor:
        """Pairs (2, pairs, batch, tokens, hidden) to gates that broadcast to them."""
        pooled = torch.cat([*pairs.mean(dim=3), *pairs.amax(dim=3)], dim=-1)  # (pairs, batch, 4 * hidden)
        channels = self.channel_fc2(self.channel_fc1(pooled).relu()).sigmoid()
        channels = torch.stack(channels.chunk(2, dim=-1))[:, :, :, None]  # (2, pairs, batch, 1, hidden)
        places = self.spatial_fc2(self.spatial_fc1(torch.cat([*pairs], dim=-1)).relu()).sigmoid()
        places = places.movedim(-1, 0)[..., None]  # (2, pairs, batch, tokens, 1)
        return self.lambda_c * channels + self.lambda_s * places


class CrossPath(nn.Module):
    """Each stream of a pair reads the other's channel context, `softmax(k^T v / sqrt(d))`, linear in the tokens.

    The queries are the projected tokens themselves; keys and values have no bias.
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads, self.scale = num_heads, (hidden_size // num_heads) ** -0.5
        self.in_proj = ModalityLinear(2, hidden_size, 2 * hidden_size)
        self.kv_proj = ModalityLinear(2, hidden_size, 2 * hidden_size, bias=False)
        self.out_proj = ModalityLinear(2, 2 * hidden_size, hidden_size)
        self.norm = ModalityNorm(2, hidden_size, eps=1e-5)

    def forward(self, pairs: Tensor) -> Tensor:
        """(2, batch, tokens, hidden) to the same."""
        own, query = self.in_proj(pairs).relu().chunk(2, dim=-1)
        keys, values = self.kv_proj(query).unflatten(-1, (2, self.num_heads, -1)).unbind(dim=3)
        context = torch.einsum("sbnhd,sbnhe->sbhde", keys, values) * self.scale
        context = context.softmax(dim=-2).flip(0)  # of the other stream
        read = torch.einsum("sbnhd,sbhde->sbnhe", query.unflatten(-1, (self.num_heads, -1)), context)
        return self.norm(pairs + self.out_proj(torch.cat([own, read.flatten(-2)], dim=-1)))


class ChannelEmbed(nn.Module):
    """Two maps, one behind the other in the channels, to one: a 1x1 convolution beside a depth-wise bottleneck."""

    def __init__(self, hidden_size: int, reduction: int):
        super().__init__()
        narrow = hidden_size // reduction
        self.residual = nn.Conv2d(2 * hidden_size, hidden_size, 1, bias=False)
        self.reduce = nn.Conv2d(2 * hidden_size, narrow, 1)
        self.dwconv = nn.Conv2d(narrow, narrow, 3, padding=1, groups=narrow)
        self.expand = nn.Conv2d(narrow, hidden_size, 1)
        self.expand_norm = nn.BatchNorm2d(hidden_size)
        self.norm = nn.BatchNorm2d(hidden_size)
        self.set_start_values()

    def set_start_values(self) -> None:
        for conv in (self.residual, self.reduce, self.dwconv, self.expand):
            fan_out = conv.weight[0, 0].numel() * conv.out_channels // conv.groups
            init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
            if conv.bias is not None:
                init.zeros_(conv.bias)

    def forward(self, maps: Tensor) -> Tensor:
        """(batch, 2 * hidden, height, width) to (batch, hidden, height, width)."""
        update = self.expand_norm(self.expand(self.dwconv(self.reduce(maps)).relu()))
        return self.norm(self.residual(maps) + update)


class RectifyFuseFusion(ModalityFusion):
    """The rectify and fuse pair of CMX (arXiv:2203.04838), on the maps that a stage returns.

    Rectify: every stream takes from the other one by channel gates and place gates, both from both streams:

        x_m' = x_m + (lambda_c * channel_o + lambda_s * place_o) * x_o

    Fuse: channel-context attention between the two and a convolutional bottleneck to one map f. In CMX the x_m' go to
    the next stage and f alone to the decoder. A stage here returns what the next one reads, and every stream has
    logits of its own; so by default (`fuse="add"`) the streams return `x_m' + fused_scale_m * f`. `fuse="map"` is CMX:
    forward returns the x_m', and a decoder or a backbone's user gets the f of every stage (`fused_map`), for which no
    stream has logits of its own. `fuse="none"` rectifies only.

    CMX is for two modalities. Of more, all pairs pass through the same weights, the lower index first; a stream takes
    the mean over its pairs, and f is the mean over all.

    Absent sensors form no pair; with a single one present f is its stream. BatchNorm reads pairs without a sensor as
    zeros while it trains.

    Start: with a small `start_gate` and `fused_scale` zero a new fusion is nearly the identity (gates are inside
    (0, 1), it cannot be exact); `start_gate=0.5` is the released start.

    Args:
        reduction: of the widths inside the gates and the bottleneck.
        lambda_c, lambda_s: parts of the channel and place gates.
        head_width: channels of an attention head; 64 gives the heads 1, 2, 5, 8 of MiT-B1 to B5, 32 those of B0.
        fuse: "add", "map" or "none".
        start_gate: what the gates start near.
        start_scale: of f in the streams.
    """

    position = "stage"

    def __init__(
        self,
        num_modalities: int,
        hidden_size: int,
        *,
        reduction: int = 1,
        lambda_c: float = 0.5,
        lambda_s: float = 0.5,
        head_width: int = 64,
        fuse: str = "add",
        start_gate: float = 0.01,
        start_scale: float = 0.0,
    ):
        super().__init__(num_modalities, hidden_size)
        num_heads = max(1, hidden_size // head_width)
        if fuse not in FUSE:
            raise ValueError(f"expected fuse to be one of {list(FUSE)}, got {fuse!r}")
        if not 0 < start_gate < 1:
            raise ValueError(f"expected start_gate between 0 and 1, got {start_gate}")
        if hidden_size % num_heads or hidden_size < reduction:
            raise ValueError(
                f"expected {hidden_size} channels to split into heads of head_width={head_width} and to leave some"
                f" after reduction={reduction}; choose a head_width that divides the width of every stage"
            )
        self.fuse, self.start_scale, self.makes_map = fuse, start_scale, fuse == "map"
        self.gates = RectifyGates(hidden_size, reduction, lambda_c, lambda_s, start_gate)
        if fuse != "none":
            self.cross_path = CrossPath(hidden_size, num_heads)
            self.channel_embed = ChannelEmbed(hidden_size, reduction)
        if fuse == "add":
            self.fused_scale = nn.Parameter(torch.empty(num_modalities, hidden_size))
        self.set_start_values()

    def set_start_values(self) -> None:
        if self.fuse == "add":
            init.constant_(self.fused_scale, self.start_scale)

    def forward(self, streams: Tensor, inputs: BlockInputs) -> tuple[Tensor, None]:
        prefix, tokens = self.split(streams, inputs)
        tokens = self.rectify(tokens, inputs.present)
        if self.fuse == "add":
            fused = self.fused(tokens, inputs.grid, inputs.present) * self.fused_scale[:, None, None]
            if inputs.present is not None:
                fused = fused.masked_fill(~has_company(inputs.present)[:, :, None, None], 0)
            tokens = tokens + fused
        return (tokens if prefix is None else torch.cat([prefix, tokens], dim=2)), None

    def fused_map(self, streams: Tensor, inputs: BlockInputs) -> Tensor:
        """The one map of rectified streams, as tokens (batch, height * width, hidden)."""
        return self.fused(self.split(streams, inputs)[1], inputs.grid, inputs.present)

    def split(self, streams: Tensor, inputs: BlockInputs) -> tuple[Tensor | None, Tensor]:
        """Tokens of no place, and those of the map, zero where a sensor is absent."""
        count = inputs.num_prefix_tokens
        tokens = streams[:, :, count:]
        if inputs.present is not None:
            tokens = tokens.masked_fill(~inputs.present[:, :, None, None], 0)
        return streams[:, :, :count] if count else None, tokens

    def pairs(self, device: torch.device) -> Tensor:
        """(2, pairs): (0, 1), (0, 2), ..., the lower index first."""
        return torch.triu_indices(self.num_modalities, self.num_modalities, offset=1, device=device)

    def slots(self, device: torch.device) -> Tensor:
        """Where the two sides of every pair lie in a table (modalities, partners), flat; (2, pairs).

        Each slot is used once: sums over the table and gradients of its entries have one order, on any device.
        """
        low, high = self.pairs(device)
        partners = self.num_modalities - 1
        return torch.stack([low * partners + high - 1, high * partners + low])

    def paired(self, tokens: Tensor) -> Tensor:
        """(modalities, batch, tokens, hidden) to (2, pairs, batch, tokens, hidden)."""
        if self.num_modalities == 2:
            return tokens[:, None]
        table = tokens[:, None].expand(-1, self.num_modalities - 1, -1, -1, -1)
        return table.flatten(0, 1)[self.slots(tokens.device)]

    def summed(self, paired: Tensor) -> Tensor:
        """What the sides of all pairs bring to the modalities; shapes as in `paired`, the other way."""
        if self.num_modalities == 2:
            return paired[:, 0]
        table = paired.flatten(0, 1)[self.slots(paired.device).flatten().argsort()]
        return table.unflatten(0, (self.num_modalities, -1)).sum(dim=1)

    def rectify(self, tokens: Tensor, present: Tensor | None = None) -> Tensor:
        """(modalities, batch, tokens, hidden) to the same."""
        paired = self.paired(tokens)
        taken = (self.gates(paired) * paired).flip(0)  # each side takes the other's
        if present is None:
            return tokens + self.summed(taken) / (self.num_modalities - 1)
        taken = taken.masked_fill(~present[self.pairs(present.device)].all(dim=0)[:, :, None, None], 0)
        partners = (present.sum(dim=0) - 1).clamp(min=1)  # (batch,)
        return tokens + self.summed(taken) / partners[:, None, None]

    def fused(self, tokens: Tensor, grid: tuple[int, int], present: Tensor | None = None) -> Tensor:
        """Rectified (modalities, batch, tokens, hidden) to (batch, tokens, hidden)."""
        pairs = self.pairs(tokens.device)
        crossed = self.cross_path(self.paired(tokens).flatten(1, 2))  # (2, pairs * batch, tokens, hidden)
        maps = self.channel_embed(tokens_to_map(torch.cat([*crossed], dim=-1), grid))
        fused = maps.flatten(2).transpose(1, 2).unflatten(0, (pairs.shape[1], -1))  # (pairs, batch, tokens, hidden)
        if present is None:
            return fused.mean(dim=0)
        both = present[pairs].all(dim=0)[:, :, None, None]
        count = both.sum(dim=0)
        alone = tokens.sum(dim=0)  # where one is present, all others are zero
        return torch.where(count > 0, fused.masked_fill(~both, 0).sum(dim=0) / count.clamp(min=1), alone)

"""The layers of Cambrian's spatial vision aggregator: each query reads its own window of the map of every encoder."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.linear_weights import weight_of

LAYER_TYPES = ("joint", "sep")


class BiaslessMlp(nn.Module):
    """`fc2(gelu(fc1(x)))` without biases."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features, bias=False)
        self.fc2 = nn.Linear(hidden_features, out_features, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class WindowReader(nn.Module):
    """Keys and values of the windows of one map: `k_proj(k_norm(x))` and `v_proj(v_norm(x))`.

    Evaluation: one query per window reads all its cells, so for windows of at least as many cells as there are heads
    the projections are moved to the query (keys) and behind the average (values), with the affine part of the norms
    folded into them: the same function at 2 C^2 instead of 2 N C^2 multiplications per window of N cells. Folding
    reads the weights; projections that something has wrapped (LoRA before merging, quantisation) are evaluated as they
    are written.

    Args:
        in_features: channels of the map.
        hidden_size: of keys and values, all heads.
        num_heads: of the attention.
        num_cells: of a window.
    """

    def __init__(self, in_features: int, hidden_size: int, num_heads: int, num_cells: int):
        super().__init__()
        self.num_heads, self.num_cells = num_heads, num_cells
        self.k_norm = nn.LayerNorm(in_features)
        self.k_proj = nn.Linear(in_features, hidden_size, bias=False)
        self.v_norm = nn.LayerNorm(in_features)
        self.v_proj = nn.Linear(in_features, hidden_size, bias=False)

    def prepare(self, windows: Tensor) -> tuple[Tensor, Tensor | None]:
        """(batch, positions, cells, channels) to what `score` and `read` take: (normed, None), or (keys, values)."""
        if self.num_cells >= self.num_heads and type(self.k_proj) is type(self.v_proj) is nn.Linear:
            return F.layer_norm(windows, windows.shape[-1:], eps=self.k_norm.eps), None
        keys, values = self.k_proj(self.k_norm(windows)), self.v_proj(self.v_norm(windows))
        return keys.unflatten(-1, (self.num_heads, -1)), values.unflatten(-1, (self.num_heads, -1))

    def score(self, query: Tensor, prepared: tuple[Tensor, Tensor | None]) -> Tensor:
        """Products of queries and keys.

        Args:
            query: (batch, queries, heads, width), one per position or one for all.
            prepared: the result of `prepare`.

        Returns:
            (batch, positions, heads, cells).
        """
        keys, values = prepared
        if values is not None:
            return (query.unsqueeze(2) * keys).sum(dim=-1).transpose(2, 3)
        to_keys = weight_of(self.k_proj).unflatten(0, (self.num_heads, -1))  # (heads, width, channels)
        offset = torch.einsum("bqhd,hd->bqh", query, to_keys @ self.k_norm.bias).unsqueeze(-1)
        folded = torch.einsum("bqhd,hdc->bqhc", query, to_keys * self.k_norm.weight)
        # a query that serves all positions reads their windows as one long one
        batch, queries, positions = query.shape[0], query.shape[1], keys.shape[1]
        states = keys.reshape(batch * queries, -1, keys.shape[-1])
        scores = (folded.flatten(0, 1) @ states.mT).view(batch, queries, self.num_heads, positions // queries, -1)
        return scores.transpose(2, 3).reshape(batch, positions, self.num_heads, -1) + offset

    def read(self, weights: Tensor, prepared: tuple[Tensor, Tensor | None]) -> Tensor:
        """Values averaged with weights (batch, positions, heads, cells) to (batch, positions, heads, width)."""
        keys, values = prepared
        if values is not None:
            return (weights.transpose(2, 3).unsqueeze(-1) * values).sum(dim=2)
        to_values = weight_of(self.v_proj).unflatten(0, (self.num_heads, -1))
        average = (weights.flatten(0, 1) @ keys.flatten(0, 1)).unflatten(0, keys.shape[:2])
        offset = weights.sum(dim=-1, keepdim=True) * (to_values @ self.v_norm.bias)
        return torch.einsum("bphc,hdc->bphd", average, to_values * self.v_norm.weight) + offset


class WindowAttention(nn.Module):
    """Attention of one query per position to its windows of several maps, one softmax over all cells.

    Args:
        in_features: channels of each map.
        hidden_size: of the query and of the output.
        num_heads: must divide `hidden_size`.
        num_cells: of a window of each map.
    """

    def __init__(self, in_features: Sequence[int], hidden_size: int, num_heads: int, num_cells: Sequence[int]):
        super().__init__()
        self.num_heads, self.num_cells = num_heads, list(num_cells)
        self.q_norm = nn.LayerNorm(hidden_size)
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.readers = nn.ModuleList(
            WindowReader(features, hidden_size, num_heads, cells)
            for features, cells in zip(in_features, num_cells, strict=True)
        )
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, query: Tensor, windows: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """(batch, positions, hidden).

        Args:
            query: (batch, positions or 1, hidden).
            windows: of each map (batch, positions, cells, channels).
            mask: (batch, positions, cells of all maps), True = visible; None for all.
        """
        query = self.q_proj(self.q_norm(query)).unflatten(-1, (self.num_heads, -1))
        query = query * query.shape[-1] ** -0.5
        prepared = [reader.prepare(states) for reader, states in zip(self.readers, windows, strict=True)]
        scores = [reader.score(query, part) for reader, part in zip(self.readers, prepared, strict=True)]
        scores = torch.cat(scores, dim=-1)  # (batch, positions, heads, cells)
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(2), float("-inf"))
        weights = scores.softmax(dim=-1).split(self.num_cells, dim=-1)
        parts = zip(self.readers, weights, prepared, strict=True)
        context = sum(reader.read(weight, part) for reader, weight, part in parts)
        return self.o_proj(context.flatten(2))


class SvaLayer(nn.Module):
    """One layer of the spatial vision aggregator (arXiv:2406.16860).

    `x = proj_in(cat(q, proj_context(c)))`, `q + proj_out(norm(x + attention(x, windows)))`. "joint": one attention to
    the windows of all maps. "sep": one attention for each map (an MLP of the cell where a window has a single one),
    weighted with `softmax(weight_mlp(cat(q, proj_context(c))))`. Windows of several cells get a position embedding.

    Args:
        query_size: channels of the queries: those of the maps, or of a language model between whose layers it works.
        context_size: channels of the context.
        in_features: channels of each map.
        num_cells: of a window of each map.
        hidden_size: inside the layer.
        num_heads: of the attention.
        layer_type: "joint" or "sep".
    """

    def __init__(
        self,
        query_size: int,
        context_size: int,
        in_features: Sequence[int],
        num_cells: Sequence[int],
        hidden_size: int = 1024,
        num_heads: int = 16,
        layer_type: str = "joint",
    ):
        super().__init__()
        if layer_type not in LAYER_TYPES:
            raise ValueError(f"expected layer_type to be one of {list(LAYER_TYPES)}, got {layer_type!r}")
        self.proj_context = nn.Linear(context_size, hidden_size, bias=False)
        self.proj_in = nn.Linear(query_size + hidden_size, hidden_size, bias=False)
        for index, (features, cells) in enumerate(zip(in_features, num_cells, strict=True)):
            shape = (cells, features)
            self.register_parameter(f"pos_embed_{index}", nn.Parameter(torch.empty(shape)) if cells > 1 else None)
        if layer_type == "joint":
            self.attention = WindowAttention(in_features, hidden_size, num_heads, num_cells)
        else:
            self.weight_mlp = BiaslessMlp(query_size + hidden_size, hidden_size, len(in_features))
            self.readers = nn.ModuleList(
                BiaslessMlp(features, hidden_size, hidden_size)
                if cells == 1
                else WindowAttention([features], hidden_size, num_heads, [cells])
                for features, cells in zip(in_features, num_cells, strict=True)
            )
        self.norm = nn.LayerNorm(hidden_size)
        self.proj_out = BiaslessMlp(hidden_size, hidden_size, query_size)
        self.set_start_values()

    def set_start_values(self) -> None:
        """Position embeddings from the unit normal distribution."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("pos_embed_"):
                init.normal_(parameter)

    def forward(self, query: Tensor, context: Tensor, windows: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """(batch, positions, query_size).

        Args:
            query: (batch, positions or 1, query_size); 1 where all positions start from the same.
            context: (batch, positions or 1, context_size).
            windows: of each map (batch, positions, cells, channels).
            mask: (batch, positions, cells of all maps), True = visible.
        """
        context = self.proj_context(context)
        states = linear_of_pair(self.proj_in, query, context)
        places = [getattr(self, f"pos_embed_{index}") for index in range(len(windows))]
        windows = [part if place is None else part + place for part, place in zip(windows, places, strict=True)]
        if hasattr(self, "attention"):
            fused = self.attention(states, windows, mask)
        else:
            shares = self.weight_mlp.fc2(F.gelu(linear_of_pair(self.weight_mlp.fc1, query, context))).softmax(dim=-1)
            fused = self.weighted_sum(states, shares, windows, mask)
        return query + self.proj_out(self.norm(states + fused))

    def weighted_sum(self, states: Tensor, shares: Tensor, windows: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """What each map says, weighted with shares (batch, positions or 1, maps)."""
        masks = [None] * len(windows) if mask is None else mask.split([part.shape[2] for part in windows], dim=-1)
        fused = 0
        for index, reader in enumerate(self.readers):
            is_attention = isinstance(reader, WindowAttention)
            cells = windows[index]
            found = reader(states, [cells], masks[index]) if is_attention else reader(cells.squeeze(2))
            fused = fused + shares[:, :, index : index + 1] * found
        return fused


class SpatialVisionSampler(nn.Module):
    """Layers of the spatial vision aggregator, one after the other; the arguments are those of `SvaLayer`."""

    def __init__(self, depth: int, *args, **kwargs):
        super().__init__()
        self.layers = nn.ModuleList(SvaLayer(*args, **kwargs) for _ in range(depth))

    def forward(self, query: Tensor, context: Tensor, windows: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """(batch, positions, query_size); the arguments are those of `SvaLayer.forward`."""
        for layer in self.layers:
            query = layer(query, context, windows, mask)
        return query


def linear_of_pair(linear: nn.Linear, first: Tensor, second: Tensor) -> Tensor:
    """`linear(cat(first, second))` of sequences, one of which may have a single token that all tokens share."""
    if type(linear) is nn.Linear and linear.bias is None and first.shape[1] != second.shape[1]:
        to_first, to_second = weight_of(linear).split([first.shape[-1], second.shape[-1]], dim=1)
        return F.linear(first, to_first) + F.linear(second, to_second)
    length = max(first.shape[1], second.shape[1])
    pair = [first.expand(-1, length, -1), second.expand(-1, length, -1)]
    return linear(torch.cat(pair, dim=-1))


def cut_windows(states: Tensor, query_grid: tuple[int, int]) -> Tensor:
    """The cells of a map that each query of a coarser grid reads, row by row.

    Args:
        states: (batch, height, width, channels).
        query_grid: divides (height, width).

    Returns:
        (batch, positions, cells of a window, channels); a view where a window has one cell.
    """
    high, wide = states.shape[1] // query_grid[0], states.shape[2] // query_grid[1]
    blocks = states.unflatten(2, (-1, wide)).unflatten(1, (-1, high)).transpose(2, 3)
    return blocks.flatten(3, 4).flatten(1, 2)

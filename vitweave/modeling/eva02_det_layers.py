"""The blocks of the EVA-02 detector ViT: windows, rotary positions, attention and the gated MLP with a norm inside."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vitweave.configuration.configuration_eva02_det import Eva02DetConfig
from vitweave.modeling.specialized_layers import eager_attention
from vitweave.modeling.tokens import DropPath


class RotaryTables(NamedTuple):
    """Cosines and sines of the rotary positions, each (positions, head size): of one window and of the whole map."""

    window: tuple[Tensor, Tensor]
    whole: tuple[Tensor, Tensor]


def rotary_tables(config: Eva02DetConfig, grid: tuple[int, int], like: Tensor) -> RotaryTables:
    """The tables for a patch grid (height, width), computed in float32 at least, in the dtype and device of `like`."""
    side = config.window_size
    return RotaryTables(rotary_table(config, (side, side), like), rotary_table(config, grid, like))


def rotary_table(config: Eva02DetConfig, grid: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (height * width, head size) of one grid.

    The first half of the head turns with the row, the second with the column, in adjacent pairs of channels. Positions
    are brought to the range of a grid of `rope_reference_size`, so that other grids meet the angles of pretraining.
    """
    axis_size = config.hidden_size // config.num_attention_heads // 2
    dtype = torch.promote_types(like.dtype, torch.float32)
    exponents = torch.arange(0, axis_size, 2, dtype=dtype, device=like.device) / axis_size
    frequencies = 1 / config.rope_theta**exponents  # (head size / 4,)
    rows, columns = (
        (torch.arange(n, dtype=dtype, device=like.device) / n * config.rope_reference_size)[:, None] * frequencies
        for n in grid
    )
    height, width = grid
    angles = torch.cat(
        (
            rows.repeat_interleave(2, dim=1)[:, None].expand(height, width, axis_size),
            columns.repeat_interleave(2, dim=1)[None].expand(height, width, axis_size),
        ),
        dim=2,
    ).flatten(0, 1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate_pairs(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys (batch, heads, tokens, head size), pairing channel 2i with channel 2i + 1."""
    first, second = tokens.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-second, first), dim=-1).flatten(-2)
    return tokens * cos.to(tokens.dtype) + turned * sin.to(tokens.dtype)  # autocast makes tokens narrower than tables


def to_windows(tokens: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Cut the map into windows, padded with zeros at the bottom and right to whole ones.

    Args:
        tokens: (batch, height * width, hidden) for grid = (height, width).

    Returns:
        (batch * windows, side * side, hidden), windows row by row.
    """
    rows, columns = window_grid(grid, side)
    if torch.compiler.is_exporting():  # views would tie the graph to maps that are, or are not, made of whole windows
        order = patches_in_windows(grid, side, tokens.device)
        windows = F.pad(tokens, (0, 0, 0, 1)).index_select(1, order)  # the last token is the padding
        return windows.flatten(0, 1).unflatten(0, (-1, side * side))
    maps = tokens.unflatten(1, grid)
    if (rows * side, columns * side) != tuple(grid):
        maps = F.pad(maps, (0, 0, 0, columns * side - grid[1], 0, rows * side - grid[0]))
    windows = maps.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3)
    return windows.flatten(3, 4).flatten(0, 2)


def from_windows(windows: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """(batch * windows, side * side, hidden) -> (batch, height * width, hidden), without the padding."""
    rows, columns = window_grid(grid, side)
    if torch.compiler.is_exporting():
        tokens = windows.flatten(0, 1).unflatten(0, (-1, rows * columns * side * side))
        return tokens.index_select(1, places_of_patches(grid, side, windows.device))
    maps = windows.unflatten(1, (side, side)).unflatten(0, (-1, rows, columns)).transpose(2, 3)
    maps = maps.flatten(3, 4).flatten(1, 2)  # (batch, rows * side, columns * side, hidden)
    return maps[:, : grid[0], : grid[1]].flatten(1, 2)


def window_grid(grid: tuple[int, int], side: int) -> tuple[int, int]:
    """Windows per column and row, those cut off at the border included."""
    return (grid[0] + side - 1) // side, (grid[1] + side - 1) // side


def patches_in_windows(grid: tuple[int, int], side: int, device: torch.device) -> Tensor:
    """For every position of every window the index of its patch, height * width in the padding: (positions,)."""
    rows, columns = window_grid(grid, side)
    position = torch.arange(rows * columns * side * side, device=device)
    window, inner = position // (side * side), position % (side * side)
    row, column = window // columns * side + inner // side, window % columns * side + inner % side
    inside = (row < grid[0]) & (column < grid[1])
    return torch.where(inside, row * grid[1] + column, grid[0] * grid[1])


def places_of_patches(grid: tuple[int, int], side: int, device: torch.device) -> Tensor:
    """For every patch its position among those of all windows: (height * width,)."""
    patch = torch.arange(grid[0] * grid[1], device=device)
    row, column = patch // grid[1], patch % grid[1]
    window = row // side * window_grid(grid, side)[1] + column // side
    return (window * side + row % side) * side + column % side


class Eva02DetAttention(nn.Module):
    """Self-attention with rotary queries and keys; the keys have no bias."""

    def __init__(self, config: Eva02DetConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], **kwargs) -> tuple[Tensor, Tensor | None]:
        query, key, value = (
            layer(hidden_states).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate_pairs(query, *rotary), rotate_pairs(key, *rotary)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        context, weights = attend(self, query, key, value, None, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(context.flatten(2)), weights


class Eva02DetMLP(nn.Module):
    """SwiGLU (arXiv:2002.05202) with a LayerNorm before its last linear."""

    def __init__(self, config: Eva02DetConfig):
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_width)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_width)
        self.norm = nn.LayerNorm(config.mlp_width, eps=config.layer_norm_eps)
        self.down_proj = nn.Linear(config.mlp_width, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gated = self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(self.norm(gated))


class Eva02DetLayer(GradientCheckpointingLayer):
    """A pre-norm block; `window_size` 0 = it attends globally.

    The zeros that fill up windows at the border come after the norm and are attended to, as in the official code: their
    keys are 0 and their values the bias of `v_proj`.
    """

    def __init__(self, config: Eva02DetConfig, index: int):
        super().__init__()
        self.window_size = config.window_size if index in config.window_blocks else 0
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Eva02DetAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Eva02DetMLP(config)
        self.drop_path = DropPath(config.drop_path_rate * index / max(config.num_hidden_layers - 1, 1))

    def forward(self, hidden_states: Tensor, grid: tuple[int, int], rotary: RotaryTables, **kwargs) -> Tensor:
        """(batch, height * width, hidden) -> the same, for grid = (height, width)."""
        normed = self.norm1(hidden_states)
        if self.window_size:
            windows = to_windows(normed, grid, self.window_size)
            attended = from_windows(self.attention(windows, rotary.window, **kwargs)[0], grid, self.window_size)
        else:
            attended, _ = self.attention(normed, rotary.whole, **kwargs)
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.mlp(self.norm2(hidden_states)))

"""Windows of a map, as Swin cuts them: padding, places, the mask of a cyclic shift."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

MASKED = -100.0  # added to the score of two places that only the shift has brought together


def pad_to_windows(maps: Tensor, size: int) -> Tensor:
    """(batch, height, width, channels), zeros to the right and below until whole windows fill it."""
    below, right = -maps.shape[1] % size, -maps.shape[2] % size
    # while exporting, asking whether there is something to pad would tie the graph to the traced size
    if not torch.compiler.is_exporting() and not below and not right:
        return maps
    return F.pad(maps, (0, 0, 0, right, 0, below))


def to_windows(maps: Tensor, size: int, num_heads: int) -> Tensor:
    """(batch, height, width, heads * head size) to (batch, windows * heads, size * size, head size)."""
    cut = maps.unflatten(3, (num_heads, -1)).unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return cut.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(1, 3)


def from_windows(windows: Tensor, size: int, num_heads: int, columns: int) -> Tensor:
    """What attention returns, (batch, size * size, windows * heads, head size), to (batch, height, width, channels).

    Args:
        columns: windows side by side.
    """
    cut = windows.unflatten(2, (-1, columns, num_heads)).unflatten(1, (size, size))
    return cut.permute(0, 3, 1, 4, 2, 5, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def shift_mask(grid: tuple[int, int], size: int, device: torch.device) -> Tensor:
    """(windows, 1, size * size, size * size) of a map of whole windows that was shifted by half a window.

    Places that the shift took from the other end of the map do not see the others in their window.
    """
    regions = []
    for side in grid:
        place = torch.arange(side, device=device)
        regions.append((place >= side - size).long() + (place >= side - size // 2))
    region = (3 * regions[0][:, None] + regions[1])[None, :, :, None]  # (1, height, width, 1)
    windows = to_windows(region, size, 1)[0, :, :, 0]  # (windows, size * size)
    apart = windows[:, :, None] != windows[:, None, :]
    return torch.zeros(apart.shape, device=device).masked_fill(apart, MASKED).unsqueeze(1)


def relative_places(size: int, device: torch.device) -> Tensor:
    """(size * size, size * size), the row of `WindowPositionBias`'s table for a query and a key in a window."""
    place = torch.arange(size * size, device=device)
    rows, columns = place // size, place % size
    down = rows[:, None] - rows + size - 1
    return down * (2 * size - 1) + columns[:, None] - columns + size - 1


class WindowPositionBias(nn.Module):
    """A learnt bias per head for every step from a place of a window to another (Swin, arXiv:2103.14030)."""

    def __init__(self, num_heads: int, window_size: int, initializer_range: float):
        super().__init__()
        self.initializer_range = initializer_range
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.set_start_values()

    def set_start_values(self) -> None:
        """Loaded tables stay as they are."""
        init.trunc_normal_(self.relative_position_bias_table, std=self.initializer_range)

    def forward(self, places: Tensor) -> Tensor:
        """(heads, area, area), of `relative_places` (area, area)."""
        return self.relative_position_bias_table[places].permute(2, 0, 1)


def resize_bias_table(table: Tensor, rows: int) -> Tensor:
    """A table for windows of another size, bicubic: (side * side, heads) to (rows, heads)."""
    if table.shape[0] == rows:
        return table
    old, new = round(table.shape[0] ** 0.5), round(rows**0.5)
    maps = F.interpolate(table.T.float().unflatten(1, (old, old))[None], size=(new, new), mode="bicubic")
    return maps[0].flatten(1).T.to(table.dtype)

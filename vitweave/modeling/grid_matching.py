"""Maps of several encoders on one grid: resizes, pixel unshuffling, resampled position tables.

Resizes run in float32 at least and come back in the type of the map. The two align_corners settings are not
interchangeable: LLaVA-HR (arXiv:2403.03003) and EAGLE (arXiv:2408.15998) want `bilinear_ac`, Mini-Gemini
(arXiv:2403.18814) and Cambrian-1 (arXiv:2406.16860) `bilinear`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitweave.configuration.encoder_fusion_plans import Grid
from vitweave.modeling.tokens import tokens_to_map


def bilinear_ac(feature_map: Tensor, grid: Grid) -> Tensor:
    """(batch, channels, height, width) to another grid, bilinear with align_corners=True, no antialias."""
    return interpolate(feature_map, grid, align_corners=True)


def bilinear(feature_map: Tensor, grid: Grid) -> Tensor:
    """(batch, channels, height, width) to another grid, bilinear with align_corners=False, no antialias."""
    return interpolate(feature_map, grid, align_corners=False)


def bicubic_antialias(feature_map: Tensor, grid: Grid) -> Tensor:
    """(batch, channels, height, width) to another grid, bicubic with antialias and align_corners=False."""
    return interpolate(feature_map, grid, align_corners=False, mode="bicubic", antialias=True)


def interpolate(feature_map: Tensor, grid: Grid, mode: str = "bilinear", **options: bool) -> Tensor:
    """Resized in float32 at least; the map itself where it has that grid."""
    if tuple(feature_map.shape[-2:]) == tuple(grid):
        return feature_map
    precise = feature_map.to(torch.promote_types(feature_map.dtype, torch.float32))
    resized = F.interpolate(precise, size=tuple(grid), mode=mode, **options)
    return resized.to(feature_map.dtype)


def avg_pool(feature_map: Tensor, grid: Grid) -> Tensor:
    """(batch, channels, height, width) to a coarser grid by means over whole blocks of cells."""
    height, width = feature_map.shape[-2:]
    if height % grid[0] or width % grid[1]:
        raise ValueError(
            f"expected a map whose sides are multiples of {grid[0]}x{grid[1]} to average over whole blocks, got"
            f" {height}x{width}; resize it with bilinear instead"
        )
    if (height, width) == tuple(grid):
        return feature_map
    precise = feature_map.to(torch.promote_types(feature_map.dtype, torch.float32))
    return F.avg_pool2d(precise, (height // grid[0], width // grid[1])).to(feature_map.dtype)


def align_ac(feature_map: Tensor, grid: Grid) -> Tensor:
    """The rule of LLaVA-HR: a finer map is averaged over whole blocks, a coarser one brought up with `bilinear_ac`."""
    height, width = feature_map.shape[-2:]
    if height >= grid[0] and width >= grid[1]:
        return avg_pool(feature_map, grid)
    return bilinear_ac(feature_map, grid)


def pixel_unshuffle_a(feature_map: Tensor, factor: int) -> Tensor:
    """Blocks of factor x factor cells to channels in the order of InternVL (arXiv:2312.14238) and LEO's ViT branch.

    `out[b, (dy * factor + dx) * channels + c, y, x] = in[b, c, y * factor + dy, x * factor + dx]`: the place in the
    block is the slow index of the new channels. (`ps_version` "v2"; "v1" has the two axes of the grid swapped.)

    Args:
        feature_map: (batch, channels, height, width).

    Returns:
        (batch, channels * factor^2, height / factor, width / factor).
    """
    check_factor(feature_map, factor)
    blocks = feature_map.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))  # (batch, channels, y, dy, x, dx)
    return blocks.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


def pixel_unshuffle_b(feature_map: Tensor, factor: int) -> Tensor:
    """Blocks of factor x factor cells to channels in the order of torch, LEO's SAM branch and EAGLE's SAM tower.

    `out[b, c * factor^2 + dy * factor + dx, y, x] = in[b, c, y * factor + dy, x * factor + dx]`: the original channel
    is the slow index of the new channels. Shapes as in `pixel_unshuffle_a`.
    """
    check_factor(feature_map, factor)
    return F.pixel_unshuffle(feature_map, factor)


def check_factor(feature_map: Tensor, factor: int):
    """Refuse a grid that is not made of whole blocks."""
    height, width = feature_map.shape[-2:]
    if factor < 1 or height % factor or width % factor:
        raise ValueError(f"expected a grid that an unshuffling by {factor} divides, got {height}x{width}")


# Values of the option `resize` of the fusions
RESIZES: dict[str, Callable[[Tensor, Grid], Tensor]] = {
    "bilinear_ac": bilinear_ac,
    "bilinear": bilinear,
    "avg_pool": avg_pool,
    "align_ac": align_ac,
}


def map_to_tokens(feature_map: Tensor) -> Tensor:
    """(batch, channels, height, width) to (batch, height * width, channels), row by row."""
    return feature_map.flatten(2).transpose(1, 2)


def resample_positions(
    table: Tensor, grid: Grid, antialias: bool = True, *, stored: Grid | None = None, num_prefixes: int = 0
) -> Tensor:
    """Resample a position table to another grid, bicubic, in float32 at least.

    LLaVA-HR and EAGLE use the antialiased form; `interpolate_pos_encoding=True` of transformers is the other one.

    Args:
        table: (1, num_prefixes + stored height * stored width, hidden).
        grid: (height, width) of the result.
        stored: grid of the table; None for a square one.
        num_prefixes: rows in front that belong to class tokens, kept as they are.

    Returns:
        (1, num_prefixes + height * width, hidden).
    """
    rows = table.shape[1] - num_prefixes
    if stored is None:
        stored = (math.isqrt(max(rows, 0)),) * 2
    if rows < 1 or stored[0] * stored[1] != rows:
        raise ValueError(
            f"expected a table of {stored[0]}x{stored[1]} positions, got {rows} beside num_prefixes={num_prefixes}:"
            " give the grid it was made for as `stored`, and how many class tokens stand in front as `num_prefixes`"
        )
    # while exporting, even asking whether the grids agree would tie the graph to the traced size
    if not torch.compiler.is_exporting() and tuple(grid) == tuple(stored):
        return table
    prefixes, positions = table[:, :num_prefixes], table[:, num_prefixes:]
    maps = tokens_to_map(positions.to(torch.promote_types(table.dtype, torch.float32)), tuple(stored))
    maps = F.interpolate(maps, size=tuple(grid), mode="bicubic", antialias=antialias)
    positions = map_to_tokens(maps).to(table.dtype)
    return torch.cat([prefixes, positions], dim=1) if num_prefixes else positions

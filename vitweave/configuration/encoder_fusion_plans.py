"""What an encoder fusion returns for given maps, by arithmetic alone: configs and processors need it before a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Grid = tuple[int, int]


@dataclass(frozen=True)
class FusionPlan:
    """The shape of what a fusion returns.

    Args:
        hidden_size: channels of the tokens.
        num_tokens: per image, or per tile.
        grid: (height, width) where the tokens are a map, row by row; None where they are a sequence.
    """

    hidden_size: int
    num_tokens: int
    grid: Grid | None = None


# name -> function of (in_channels, grids, hidden_size, **options of the fusion that change the plan)
FUSION_PLANS: dict[str, Callable[..., FusionPlan]] = {}


def cells(grid: Grid) -> int:
    """How many tokens a grid has."""
    return grid[0] * grid[1]


def common_grid(grids: Sequence[Grid], grid: int | Sequence[int] | None) -> Grid:
    """The grid that was asked for (a side, or height and width), or the first encoder's."""
    if grid is None:
        return grids[0]
    return (grid, grid) if isinstance(grid, int) else (grid[0], grid[1])

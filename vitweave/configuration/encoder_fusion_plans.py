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


def cells(grid: Grid) -> int:
    """How many tokens a grid has."""
    return grid[0] * grid[1]


def common_grid(grids: Sequence[Grid], grid: int | Sequence[int] | None) -> Grid:
    """The grid that was asked for (a side, or height and width), or the first encoder's."""
    if grid is None:
        return grids[0]
    return (grid, grid) if isinstance(grid, int) else (grid[0], grid[1])


RESIZES = ("align_ac", "avg_pool", "bilinear", "bilinear_ac")  # see vitweave/modeling/grid_matching.py


def check_resize(resize: str, grids: Sequence[Grid], target: Grid):
    """Refuse an unknown way to resize maps, and one by whole blocks between grids that do not divide."""
    if resize not in RESIZES:
        raise ValueError(f"expected resize to be one of {list(RESIZES)}, got {resize!r}")
    for index, (height, width) in enumerate(grids):
        finer = height >= target[0] and width >= target[1]
        by_blocks = resize == "avg_pool" or (resize == "align_ac" and finer)
        if by_blocks and (height % target[0] or width % target[1]):
            raise ValueError(
                f"expected a map of encoder {index} that resize={resize!r} cuts into {target[0]}x{target[1]} whole"
                f" blocks, got {height}x{width}: change its image_size, or take resize='bilinear_ac'"
            )


def plan_channel_concat(
    in_channels: Sequence[int],
    grids: Sequence[Grid],
    hidden_size: int | None = None,
    *,
    grid: int | Sequence[int] | None = None,
    resize: str = "bilinear_ac",
    projector: str | None = None,
) -> FusionPlan:
    """All channels side by side on one grid."""
    grid = common_grid(grids, grid)
    check_resize(resize, grids, grid)
    width = sum(in_channels) if hidden_size is None else hidden_size
    if projector in ("identity", "residual") and width != sum(in_channels):
        raise ValueError(
            f"expected hidden_size to be None or the sum of all channels, {sum(in_channels)}, with"
            f" projector={projector!r}, got {hidden_size}"
        )
    return FusionPlan(width, cells(grid), grid)


def plan_sequence_concat(
    in_channels: Sequence[int],
    grids: Sequence[Grid],
    hidden_size: int | None = None,
    *,
    order: str = "interleave",
    projector: str | Sequence[str] = "norm_mlp",
    num_prefixes: Sequence[int] | None = None,
) -> FusionPlan:
    """The tokens of all encoders, one after the other or in turns."""
    width, counts = in_channels[0] if hidden_size is None else hidden_size, [cells(grid) for grid in grids]
    names = [projector] * len(counts) if isinstance(projector, str) else list(projector)
    prefixes = [0] * len(counts) if num_prefixes is None else list(num_prefixes)
    if order not in ("interleave", "append"):
        raise ValueError(f"expected order to be 'interleave' or 'append', got {order!r}")
    for option, entries in (("projector", names), ("num_prefixes", prefixes)):
        if len(entries) != len(counts):
            raise ValueError(f"expected one entry of {option} for each of {len(counts)} encoders, got {entries}")
    for index, (name, channels) in enumerate(zip(names, in_channels, strict=True)):
        if name in ("identity", "residual") and channels != width:
            raise ValueError(
                f"expected {width} channels of every encoder with projector={name!r}, got {channels} of encoder"
                f" {index}: give that encoder another projector, e.g. 'norm_mlp'"
            )
    if order == "interleave" and any(prefixes):
        raise ValueError(
            f"expected no class tokens with order='interleave', which pairs places, got num_prefixes={prefixes}: take"
            " order='append'"
        )
    if order == "interleave" and len(set(counts)) > 1:
        raise ValueError(
            f"expected as many tokens of every encoder with order='interleave', got {counts}: change an image_size,"
            " unshuffle the finer map, or take order='append'"
        )
    return FusionPlan(width, sum(counts) + sum(prefixes))


def plan_add(
    in_channels: Sequence[int],
    grids: Sequence[Grid],
    hidden_size: int | None = None,
    *,
    resize: str = "bilinear_ac",
    direct: bool = False,
) -> FusionPlan:
    """The first encoder's map, changed by the others."""
    check_resize(resize, grids, grids[0])
    return FusionPlan(in_channels[0] if hidden_size is None else hidden_size, cells(grids[0]), grids[0])


def plan_deformable(
    in_channels: Sequence[int],
    grids: Sequence[Grid],
    hidden_size: int | None = None,
    *,
    num_heads: int = 8,
    num_points: int = 4,
) -> FusionPlan:
    """The first encoder's map, changed by what its tokens sample in the others."""
    width = in_channels[0] if hidden_size is None else hidden_size
    if len(grids) < 2:
        raise ValueError("expected a second encoder whose map the tokens of the first one sample, got one encoder")
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"expected num_heads to divide the hidden size {width}, got {num_heads}")
    if num_points < 1:
        raise ValueError(f"expected at least one point per head and map, got num_points={num_points}")
    return FusionPlan(width, cells(grids[0]), grids[0])


def plan_spatial_vision_aggregator(
    in_channels: Sequence[int],
    grids: Sequence[Grid],
    hidden_size: int | None = None,
    *,
    query_sides: Sequence[int | Sequence[int]] | None = None,
    final_side: int | Sequence[int] | None = None,
    tower_sides: Sequence[int | Sequence[int]] | None = None,
    vision_hidden_size: int = 1024,
    **_,
) -> FusionPlan:
    """Query groups, brought to one grid and concatenated."""
    grids, queries, final = sva_grids(grids, query_sides, final_side, tower_sides)
    for index, grid in enumerate(grids):
        for query in queries:
            if grid[0] % query[0] or grid[1] % query[1]:
                raise ValueError(
                    f"expected query grids that divide the maps into whole windows, got {query[0]}x{query[1]} queries"
                    f" for the {grid[0]}x{grid[1]} map of encoder {index}; set query_sides, or tower_sides for the"
                    " grids that the maps are resized to"
                )
    width = vision_hidden_size * len(queries)
    if hidden_size not in (None, width):
        raise ValueError(
            f"expected hidden_size to be None or vision_hidden_size times query groups = {width}, got {hidden_size}"
        )
    return FusionPlan(width, cells(final), final)


def sva_grids(
    grids: Sequence[Grid],
    query_sides: Sequence[int | Sequence[int]] | None,
    final_side: int | Sequence[int] | None,
    tower_sides: Sequence[int | Sequence[int]] | None,
) -> tuple[list[Grid], list[Grid], Grid]:
    """Of the spatial vision aggregator: the grids of the maps as they are read, of the query groups, of the output."""
    if tower_sides is not None and len(tower_sides) != len(grids):
        raise ValueError(f"expected one entry of tower_sides for each of {len(grids)} encoders, got {len(tower_sides)}")
    if query_sides is not None and not query_sides:
        raise ValueError("expected at least one query group in query_sides, got none")
    grids = [tuple(grid) for grid in grids] if tower_sides is None else [common_grid([], side) for side in tower_sides]
    coarsest = min(grids, key=cells)
    queries = [coarsest] if query_sides is None else [common_grid([], side) for side in query_sides]
    return grids, queries, common_grid([max(queries, key=cells)], final_side)


def plan_query_former(
    in_channels: Sequence[int],
    grids: Sequence[Grid],
    hidden_size: int | None = None,
    *,
    queries_per_encoder: int = 32,
    width: int = 768,
    **_,
) -> FusionPlan:
    """So many queries for each encoder."""
    if queries_per_encoder < 1:
        raise ValueError(f"expected at least one query per encoder, got queries_per_encoder={queries_per_encoder}")
    return FusionPlan(width if hidden_size is None else hidden_size, queries_per_encoder * len(in_channels))


def plan_mixture_of_resolution(
    in_channels: Sequence[int],
    grids: Sequence[Grid],
    hidden_size: int | None = None,
    *,
    adapter_layers: Sequence[int] = (),
    gate: str = "scalar",
    gate_input: str = "updated",
    projects: str = "both",
) -> FusionPlan:
    """The map of encoder 0, which encoder 1 adds to."""
    known = {"gate": ("scalar", "vector"), "gate_input": ("updated", "branches"), "projects": ("both", "slow")}
    for (option, values), value in zip(known.items(), (gate, gate_input, projects), strict=True):
        if value not in values:
            raise ValueError(f"expected {option} to be one of {list(values)}, got {value!r}")
    if len(set(adapter_layers)) < len(adapter_layers) or any(layer < 1 for layer in adapter_layers):
        raise ValueError(
            f"expected adapter_layers to be different numbers of blocks, 1 or more, got {list(adapter_layers)}"
        )
    if len(grids) != 2:
        raise ValueError(
            f"expected two encoders for mixture_of_resolution, the fast one and then the slow one, got {len(grids)}"
        )
    check_own_width("mixture_of_resolution", in_channels, hidden_size)
    fast, slow = grids
    finer = all(s % f == 0 for s, f in zip(slow, fast, strict=True))
    coarser = all(f % s == 0 for s, f in zip(slow, fast, strict=True))
    if not (finer or coarser):
        raise ValueError(
            "expected the sides of the slow encoder's grid to divide those of the fast one's, or to be multiples of"
            f" them, got a slow grid of {slow[0]}x{slow[1]} and a fast one of {fast[0]}x{fast[1]}: choose an image size"
            f" for encoder 1 whose grid has a height among {divisors(fast[0])} and a width among {divisors(fast[1])},"
            f" or multiples of {fast[0]}x{fast[1]}"
        )
    return FusionPlan(in_channels[0], cells(fast), tuple(fast))


def plan_patch_info_mining(
    in_channels: Sequence[int],
    grids: Sequence[Grid],
    hidden_size: int | None = None,
    *,
    softmax_scale: float | None = None,
    crops: int = 1,
    has_global_view: bool = False,
) -> FusionPlan:
    """As many tokens as all views of encoder 0 have; a map where there is one view."""
    if len(grids) < 2:
        raise ValueError("expected patch_info_mining to get at least two encoders, queries and then detail, got one")
    check_own_width("patch_info_mining", in_channels, hidden_size)
    if crops < 1:
        raise ValueError(f"expected crops to be the number of crops per side, at least 1, got {crops}")
    query, detail = grids[0], finest_grid(grids[1:])
    needed = (query[0] * crops, query[1] * crops)
    if any(d % n for d, n in zip(detail, needed, strict=True)):
        nearest = [-(-d // n) * n for d, n in zip(detail, needed, strict=True)]
        raise ValueError(
            f"expected the detail map to have a whole window of cells for each of {needed[0]}x{needed[1]} queries"
            f" (grid {query[0]}x{query[1]}, crops={crops}), got {detail[0]}x{detail[1]} cells: choose image sizes for"
            f" which both sides are multiples, such as {nearest[0]}x{nearest[1]} cells"
        )
    views = crops**2 + has_global_view
    return FusionPlan(in_channels[0], views * cells(query), tuple(query) if views == 1 else None)


def finest_grid(grids: Sequence[Grid]) -> Grid:
    """The largest height and the largest width of several grids."""
    return max(grid[0] for grid in grids), max(grid[1] for grid in grids)


def divisors(number: int) -> list[int]:
    """What divides a number, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def check_own_width(name: str, in_channels: Sequence[int], hidden_size: int | None) -> None:
    """Refuse another width than encoder 0's, for fusions that return it."""
    if hidden_size not in (None, in_channels[0]):
        raise ValueError(
            f"expected hidden_size to be None or the {in_channels[0]} channels of encoder 0, which {name} returns, got"
            f" {hidden_size}; a projector behind the tower changes the width"
        )


# name -> function of (in_channels, grids, hidden_size, **options of the fusion that change the plan)
FUSION_PLANS: dict[str, Callable[..., FusionPlan]] = {
    "add": plan_add,
    "channel_concat": plan_channel_concat,
    "deformable": plan_deformable,
    "mixture_of_resolution": plan_mixture_of_resolution,
    "patch_info_mining": plan_patch_info_mining,
    "query_former": plan_query_former,
    "sequence_concat": plan_sequence_concat,
    "spatial_vision_aggregator": plan_spatial_vision_aggregator,
}

"""How many tokens an image becomes, by arithmetic alone: shared by configs, processors and models."""

from vitweave.configuration.encoder_fusion_plans import Grid, cells


def visible_grid(side: int, height: int, width: int) -> tuple[int, int, int, int]:
    """The part of a square grid that shows an image that was padded to a square at its centre.

    The rule of Cambrian-1 (arXiv:2406.16860) on whole numbers: `(side - floor(shorter * side / longer)) // 2` rows or
    columns are padding at either end. Where the released code would leave nothing of a very long image, one or two
    rows or columns in the middle stay; where its rounded quotients fall below a whole number (about one size in
    50000), the true quotient counts.

    Args:
        side: of the grid.
        height and width: of the image before it was padded.

    Returns:
        rows, columns, and the first visible row and column.
    """
    if side < 1 or height < 1 or width < 1:
        raise ValueError(f"expected a grid and an image of positive size, got side={side}, image {height}x{width}")
    longer = max(height, width)
    most = (side - 1) // 2
    top, left = (min((side - length * side // longer) // 2, most) for length in (height, width))
    return side - 2 * top, side - 2 * left, top, left


def check_token_layout(tokens_per_tile: int, grid: Grid | None, image_newline: bool, unpad: bool) -> None:
    """Refuse rows that are to be ended or cut where the tokens are no rows, or not as many as are counted."""
    if tokens_per_tile < 1:
        raise ValueError(f"expected at least one token per tile, got {tokens_per_tile}")
    if grid is None:
        if image_newline or unpad:
            raise ValueError(
                "image_newline and unpad work on the rows of a grid, but these tokens are a sequence (grid=None); use "
                "a fusion that keeps its grid, or leave both off"
            )
        return
    if cells(grid) != tokens_per_tile:
        raise ValueError(
            f"expected {grid[0]}x{grid[1]}={cells(grid)} tokens per tile on this grid, got {tokens_per_tile}"
        )
    if unpad and grid[0] != grid[1]:
        raise ValueError(f"unpad undoes square padding and needs a square grid, got {grid[0]}x{grid[1]}")


def tokens_per_image(
    tokens_per_tile: int,
    num_tiles: int = 1,
    grid: Grid | None = None,
    image_newline: bool = False,
    unpad: bool = False,
    image_size: Grid | None = None,
) -> int:
    """How many tokens one image becomes.

    Args:
        tokens_per_tile: what the tower returns for one tile.
        num_tiles: tiles of the image, thumbnail included.
        grid: (rows, columns) of a tile's tokens; needed by the next two.
        image_newline: one more token ends each row.
        unpad: only the rows and columns that show the image count; one tile per image.
        image_size: (height, width) before square padding; needed by `unpad`.
    """
    if num_tiles < 1:
        raise ValueError(f"expected at least one tile per image, got {num_tiles}")
    check_token_layout(tokens_per_tile, grid, image_newline, unpad)
    if not image_newline and not unpad:
        return tokens_per_tile * num_tiles
    rows, columns = grid
    if unpad:
        if num_tiles != 1 or image_size is None:
            raise ValueError(
                f"unpad takes one square-padded tile per image and its (height, width), got {num_tiles} tiles and "
                f"image_size={image_size}"
            )
        rows, columns, _, _ = visible_grid(rows, int(image_size[0]), int(image_size[1]))
    return num_tiles * rows * (columns + int(image_newline))


def count_image_tokens(config, num_tiles: int = 1, image_size: Grid | None = None) -> int:
    """`tokens_per_image` of a vision-language config, or of a tower's.

    Args:
        config: with `vision_config`, `image_newline` and `unpad`; or a tower's, with `num_tokens` and `fused_grid`.
    """
    tower = getattr(config, "vision_config", config)
    return tokens_per_image(
        tower.num_tokens,
        num_tiles,
        tower.fused_grid,
        getattr(config, "image_newline", False),
        getattr(config, "unpad", False),
        image_size,
    )

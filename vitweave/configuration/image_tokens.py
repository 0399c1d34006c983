"""How many tokens an image becomes, by arithmetic alone: shared by configs, processors and models."""


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

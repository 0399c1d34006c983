"""The visible part of images that were padded to squares: masks, and tokens with a newline after every row."""

import torch
from torch import Tensor


def visible_cells(image_sizes: Tensor, side: int) -> Tensor:
    """Which cells of a square grid show the image; the arithmetic of `visible_grid` for a batch.

    Args:
        image_sizes: (batch, 2), int64, (height, width) before padding to a square at the centre.
        side: of the grid.

    Returns:
        (batch, side, side), True = visible.
    """
    longer = image_sizes.amax(dim=1, keepdim=True)
    visible = torch.div(image_sizes * side, longer, rounding_mode="floor")
    start = torch.div(side - visible, 2, rounding_mode="floor").clamp(max=(side - 1) // 2)  # (batch, 2)
    place = torch.arange(side, device=image_sizes.device)
    inside = (place >= start[..., None]) & (place < side - start[..., None])  # (batch, 2, side)
    return inside[:, 0, :, None] & inside[:, 1, None, :]


def add_newlines(tokens: Tensor, image_sizes: Tensor | None, newline: Tensor) -> list[Tensor]:
    """Crop square grids of tokens to what shows the image and end each row with a newline, as Cambrian-1 does.

    Args:
        tokens: (tiles, side * side, hidden), row by row.
        image_sizes: (tiles, 2), int64, (height, width) before padding to a square; None where nothing was padded.
        newline: (hidden,).

    Returns:
        per tile (rows * (columns + 1), hidden), with the rows and columns of `visible_grid`.
    """
    side = round(tokens.shape[1] ** 0.5)
    if side * side != tokens.shape[1]:
        raise ValueError(f"expected square grids of tokens to put newlines into, got {tokens.shape[1]} tokens per tile")
    grids = tokens.unflatten(1, (side, side))
    newlines = newline.to(tokens.dtype).expand(tokens.shape[0], side, 1, -1)
    rows = torch.cat([grids, newlines], dim=2)  # (tiles, side, side + 1, hidden)
    if image_sizes is None:
        return list(rows.flatten(1, 2).unbind(0))
    visible = visible_cells(image_sizes.to(tokens.device), side)
    visible = torch.cat([visible, visible.any(dim=2, keepdim=True)], dim=2)
    return list(rows[visible].split(visible.sum(dim=(1, 2)).tolist()))

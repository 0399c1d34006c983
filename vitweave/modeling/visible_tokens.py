"""The visible part of images that were padded to squares: masks, and tokens with a newline after every row."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.configuration.encoder_fusion_plans import Grid


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


def shown_tokens(
    tokens: Tensor, grid: Grid, image_sizes: Tensor | None, newline: Tensor | None
) -> tuple[Tensor, list[int] | int]:
    """Crop grids of tokens to what shows the image, and end each row with a newline, as Cambrian-1 does.

    Args:
        tokens: (tiles, rows * columns, hidden), row by row.
        grid: (rows, columns).
        image_sizes: (tiles, 2), int64, (height, width) before padding to a square; None where nothing was padded.
        newline: (hidden,), or None for none.

    Returns:
        the tokens of all tiles one after the other, (tokens, hidden), with the rows and columns of `visible_grid`; how
        many each tile has, one number where all have as many.
    """
    rows = tokens.unflatten(1, grid)
    if newline is not None:
        ends = newline.to(tokens).expand(tokens.shape[0], grid[0], 1, -1)
        rows = torch.cat([rows, ends], dim=2)  # (tiles, rows, columns + 1, hidden)
    if image_sizes is None:
        return rows.flatten(0, 2), rows.shape[1] * rows.shape[2]
    if grid[0] != grid[1]:
        raise ValueError(f"expected square grids of tokens to cut padding off, got {grid[0]}x{grid[1]}")
    visible = visible_cells(image_sizes.to(tokens.device), grid[0])
    if newline is not None:
        visible = torch.cat([visible, visible.any(dim=2, keepdim=True)], dim=2)
    return rows[visible], visible.sum(dim=(1, 2)).tolist()


class ImageNewline(nn.Module):
    """The learned vector at the end of a row of image tokens, as a module, which LoRA can save beside its adapters."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.set_start_values()

    def set_start_values(self) -> None:
        """A vector of about unit length, as in Cambrian-1."""
        init.normal_(self.weight, std=self.weight.shape[0] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(hidden,), of the type and on the device of the tokens."""
        return self.weight.to(tokens)


def add_newlines(tokens: Tensor, image_sizes: Tensor | None, newline: Tensor) -> list[Tensor]:
    """`shown_tokens` of square grids, tile by tile.

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
    return list(torch.split(*shown_tokens(tokens, (side, side), image_sizes, newline)))

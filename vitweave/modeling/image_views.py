"""Small views of a large image, as Mini-Gemini (arXiv:2403.18814) feeds its low-resolution encoder."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitweave.modeling.grid_matching import bilinear


def views_of(pixel_values: Tensor, side: int | Sequence[int], crops: int = 1, global_view: bool = False) -> Tensor:
    """The image at another size, cut into crops, and the whole of it.

    The normalised pixels are resized to crops * side (bilinear, align_corners=False, no antialias) and cut; the global
    view is made from that larger image, not from the original. Mini-Gemini's own code puts the global view last and its
    tokens first; here it is first in both.

    Args:
        pixel_values: (batch, channels, height, width), normalised.
        side: of a view, or its (height, width).
        crops: number of crops per side, 1 for the whole image.
        global_view: put one more view in front that shows the whole image.

    Returns:
        (batch, views, channels, height, width): the global view where it is asked for, then the crops row by row.
    """
    height, width = (side, side) if isinstance(side, int) else side
    enlarged = bilinear(pixel_values, (height * crops, width * crops))
    cut = enlarged.unflatten(3, (crops, width)).unflatten(2, (crops, height))  # (batch, channels, row, y, column, x)
    views = cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    if not global_view:
        return views
    return torch.cat([bilinear(enlarged, (height, width))[:, None], views], dim=1)

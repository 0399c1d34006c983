"""Dense prediction over windows, for images larger than the model was trained on."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_WINDOWS = 100_000  # of one image


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixel of each window along one axis; the last window ends exactly at the border."""
    steps = max(math.ceil((length - window) / stride), 0)
    return [min(step * stride, length - window) for step in range(steps + 1)]


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """One number for both axes, or (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


@torch.no_grad()
def sliding_window_logits(
    predict: Callable[[Tensor], Tensor],
    pixel_values: Tensor,
    window: int | tuple[int, int] = 512,
    stride: int | tuple[int, int] = 341,
    batch_size: int = 8,
    average: str = "logits",
) -> Tensor:
    """Predict overlapping windows and average them where they overlap (512 and 341 are DINOv2's protocol).

    Args:
        predict: (windows, channels, height, width) -> logits (windows, num_labels, any height, any width), or an output
            with `.logits`; a model in eval mode will do. Logits of another size are resized to the window's.
        pixel_values: (batch, channels, height, width), normalised; an image smaller than the window is padded with 0
            below and to the right, and the padding is cut off again.
        window, stride: pixels, one number or (height, width).
        batch_size: windows per call of `predict`.
        average: "logits" or "probabilities" (softmax over the labels before averaging).

    Returns:
        (batch, num_labels, height, width): averaged logits, or averaged probabilities.
    """
    window, stride = as_pair(window), as_pair(stride)
    if not all(0 < step <= edge for step, edge in zip(stride, window, strict=True)):
        raise ValueError(f"expected 0 < stride <= window so that every pixel is covered, got {stride} and {window}")
    if average not in ("logits", "probabilities"):
        raise ValueError(f"unknown average {average!r}; known: ['logits', 'probabilities']")
    batch, _, height, width = pixel_values.shape
    padded = F.pad(pixel_values, (0, max(0, window[1] - width), 0, max(0, window[0] - height)))
    rows, columns = (
        window_starts(length, edge, step) for length, edge, step in zip(padded.shape[-2:], window, stride, strict=True)
    )
    if len(rows) * len(columns) > MAX_WINDOWS:
        raise ValueError(
            f"expected at most {MAX_WINDOWS} windows per image, got {len(rows)}x{len(columns)} for {height}x{width}"
            f" pixels; take a larger stride than {stride}"
        )
    places = [(sample, top, left) for sample in range(batch) for top in rows for left in columns]
    total = None
    for first in range(0, len(places), batch_size):
        some = places[first : first + batch_size]
        crops = torch.stack([padded[i, :, top : top + window[0], left : left + window[1]] for i, top, left in some])
        logits = predict(crops)
        logits = getattr(logits, "logits", logits).float()
        if logits.shape[-2:] != window:
            logits = F.interpolate(logits, size=window, mode="bilinear", align_corners=False)
        logits = logits.softmax(dim=1) if average == "probabilities" else logits
        if total is None:
            total = logits.new_zeros(batch, logits.shape[1], *padded.shape[-2:])
        for (sample, top, left), values in zip(some, logits, strict=True):
            total[sample, :, top : top + window[0], left : left + window[1]] += values
    down, across = coverage(rows, window[0], padded.shape[-2]), coverage(columns, window[1], padded.shape[-1])
    counts = torch.outer(down, across).to(total)  # how many windows saw each pixel
    return (total / counts)[..., :height, :width]


def coverage(starts: list[int], window: int, length: int) -> Tensor:
    """How many of the windows cover each position along one axis: (length,)."""
    counts = torch.zeros(length)
    for start in starts:
        counts[start : start + window] += 1
    return counts

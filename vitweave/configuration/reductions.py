"""How an encoder shrinks the grid of pixels, layer by layer, by arithmetic alone."""

from collections.abc import Sequence
from typing import NamedTuple


class Reduction(NamedTuple):
    """How one layer shrinks the grid, written as the convolution that would do it; each entry is (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


def floor_reduction(stride: int | Sequence[int]) -> Reduction:
    """Non-overlapping patches; pixels that fill no whole patch are left out, as a convolution does."""
    pair = as_pair(stride)
    return Reduction(pair, pair, (0, 0))


def ceil_reduction(stride: int | Sequence[int]) -> Reduction:
    """The image is padded up to whole patches."""
    return Reduction((3, 3), as_pair(stride), (1, 1))


KEEP = Reduction((1, 1), (1, 1), (0, 0))


def in_one(reductions: Sequence[Reduction]) -> Reduction:
    """The one reduction that several in a row amount to."""
    kernel, stride, padding = [1, 1], [1, 1], [0, 0]
    for reduction in reductions:
        for axis in (0, 1):
            kernel[axis] += stride[axis] * (reduction.kernel[axis] - 1)
            padding[axis] += stride[axis] * reduction.padding[axis]
            stride[axis] *= reduction.stride[axis]
    return Reduction(as_pair(kernel), as_pair(stride), as_pair(padding))


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """A size that may be one number or (height, width), as (height, width)."""
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
    if len(pair) != 2 or not all(isinstance(side, int) for side in pair):
        raise ValueError(f"expected one number or (height, width), got {size!r:.100}")
    return pair

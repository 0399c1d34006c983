"""Images drawn with replacement, for intervals of what was measured image by image."""

import torch
from torch import Tensor


def resampled_sums(values: Tensor, resamples: int) -> Tensor:
    """(resamples, numbers) sums over as many drawn images as there are; the same draws in every call.

    So two models can be compared image by image. Memory does not grow with images times resamples.

    Args:
        values: (images, numbers), float64.
    """
    generator, count = torch.Generator().manual_seed(0), len(values)
    sums = []
    for _ in range(resamples):
        drawn = torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count)
        sums.append(drawn.double() @ values)
    return torch.stack(sums)

"""Magnitudes: patches of outlying norm, and hidden dimensions that only one token role uses."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class NormOutliers:
    """Patches whose norm exceeds a threshold."""

    threshold: float
    mask: Tensor  # like the norms, bool
    fraction: float


def median(values: Tensor) -> Tensor:
    """The median of all values, the average of the two middle ones for an even count (torch takes the lower one)."""
    ordered = values.flatten().sort().values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def norm_outliers(norms: Tensor, threshold: float | None = None, deviations: float = 3.0) -> NormOutliers:
    """Find high-norm patches (the artifacts of "Vision Transformers Need Registers", arXiv:2309.16588).

    Args:
        norms: patch norms of any shape, e.g. (batch, patches).
        threshold: absolute threshold (150 for DINOv2-g in that paper); None = median + deviations * 1.4826 * MAD, where
            1.4826 makes the median absolute deviation estimate the standard deviation of normal data.
        deviations: how many of these standard deviations lie between median and threshold.
    """
    if threshold is None:
        middle = median(norms)
        threshold = float(middle + deviations * 1.4826 * median((norms - middle).abs()))
    mask = norms > threshold
    return NormOutliers(threshold, mask, float(mask.double().mean()))


def cls_share(abs_mean_cls: Tensor, abs_mean_patch: Tensor) -> Tensor:
    """Share of the class token in each dimension's mean magnitude, in [0, 1]; 0.5 where both are zero.

    Args:
        abs_mean_cls, abs_mean_patch: (layers, hidden).
    """
    total = abs_mean_cls + abs_mean_patch
    return torch.where(total > 0, abs_mean_cls / total.clamp_min(torch.finfo(total.dtype).tiny), 0.5)


def one_role_dimensions(share: Tensor, tau: float = 0.9) -> dict[str, list[list[int]]]:
    """Dimensions used by one role only: share > tau ("cls") or share < 1 - tau ("patch"), a list per layer.

    Args:
        share: (layers, hidden) from `cls_share`.
        tau: between 0.5 and 1.
    """
    if not 0.5 <= tau <= 1:
        raise ValueError(f"expected tau between 0.5 and 1, got {tau}")
    return {
        "cls": [torch.nonzero(row > tau).flatten().tolist() for row in share],
        "patch": [torch.nonzero(row < 1 - tau).flatten().tolist() for row in share],
    }

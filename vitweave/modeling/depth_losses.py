"""Losses between predicted and measured depth, (batch, 1, height, width) in metres; 0 marks pixels without a value."""

import torch
from torch import Tensor

EPS = 1e-3  # metres; added before the logarithm, as in the published code


def log_difference(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log(prediction) - log(target), 0 where the target is not positive, and the mask of valid pixels."""
    valid = target > 0
    difference = (prediction + EPS).log() - (target.where(valid, torch.ones_like(target)) + EPS).log()
    return difference.where(valid, torch.zeros_like(difference)), valid


def sig_loss(prediction: Tensor, target: Tensor, warm_up: bool = False) -> Tensor:
    """Scale-aware logarithmic loss sqrt(Var(g) + 0.15 mean(g)^2), g the log difference (arXiv:1406.2283, as in DINOv2).

    Args:
        warm_up: leave the variance out, as the published training does for its first 100 steps.
    """
    difference, valid = log_difference(prediction, target)
    values = difference[valid]
    if len(values) < 2:
        return difference.sum() * 0  # no valid pixel: finite, and without influence
    spread = 0 if warm_up else values.var()
    return (spread + 0.15 * values.mean() ** 2).sqrt()


def gradient_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Differences of the log difference between pixels two apart, at the steps 1, 2, 4 and 6 (the published ones).

    On height and width, as in DINOv3's code; DINOv2's slices the batch and channel axes instead.
    """
    difference, valid = log_difference(prediction, target)
    total = difference.sum() * 0
    for step in (1, 2, 4, 6):
        coarse, seen = difference[..., ::step, ::step], valid[..., ::step, ::step]
        rows = (coarse[..., 2:, :] - coarse[..., :-2, :]).abs() * (seen[..., 2:, :] & seen[..., :-2, :])
        columns = (coarse[..., 2:] - coarse[..., :-2]).abs() * (seen[..., 2:] & seen[..., :-2])
        total = total + (rows.sum() + columns.sum()) / seen.sum().clamp(min=1)
    return total

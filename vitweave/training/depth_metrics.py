"""Figures of merit of predicted depth."""

import torch
from torch import Tensor


def depth_metrics(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """rmse (metres), abs_rel, a1 to a3 (share of pixels within a factor 1.25, 1.25^2, 1.25^3) and log10.

    Args:
        prediction, target: equal shapes, metres; pixels with target <= 0 have no value and do not count.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"expected equal shapes, got {tuple(prediction.shape)} and {tuple(target.shape)}; resize first"
        )
    valid = target > 0
    prediction, target = prediction[valid].double(), target[valid].double()
    ratio = torch.maximum(prediction / target, target / prediction)
    found = {
        "rmse": (prediction - target).square().mean().sqrt(),
        "abs_rel": ((prediction - target).abs() / target).mean(),
        **{f"a{k}": (ratio < 1.25**k).double().mean() for k in (1, 2, 3)},
        "log10": (prediction.log10() - target.log10()).abs().mean(),
    }
    return {name: value.item() for name, value in found.items()}

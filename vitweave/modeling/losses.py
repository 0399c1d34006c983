"""Losses of semantic segmentation.

Each takes logits (batch, num_labels, height, width) and labels (batch, height, width) of the same size, computes in
float32 (float64 stays), and gives a scalar. Pixels labelled `ignore_index` count nowhere; where nothing counts, the
loss is 0 and still has a gradient (of zeros).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitweave.modeling.options import check_options, pick


class PixelLoss(nn.Module):
    """Base: what each pixel costs and how much it counts."""

    def __init__(self, ignore_index: int = 255, class_weights: list[float] | None = None):
        super().__init__()
        self.ignore_index = ignore_index
        self.class_weights = class_weights

    def weights_of_classes(self, logits: Tensor) -> Tensor:
        """The class weights (num_labels,), ones where none are set."""
        weights = self.class_weights or [1.0] * logits.shape[1]
        return torch.tensor(weights, dtype=logits.dtype, device=logits.device)

    def pixel_costs(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood and weight of each pixel, both (batch, height, width) and 0 where ignored."""
        labels, logits = labels.long(), at_least_float32(logits)
        costs = F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="none")
        valid = labels != self.ignore_index
        weights = self.weights_of_classes(logits)[labels.masked_fill(~valid, 0)]
        return costs, weights.masked_fill(~valid, 0)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError


class CrossEntropyLoss(PixelLoss):
    """Weighted mean of the negative log-likelihood over the valid pixels."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        # fused: with a frozen encoder's cached features the loss is most of a step
        labels, logits = labels.long(), at_least_float32(logits)
        valid = labels != self.ignore_index
        if self.class_weights is None:
            total = F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="sum")
            return total / valid.sum().clamp_min(1)
        weights = self.weights_of_classes(logits)
        total = F.cross_entropy(logits, labels, weights, ignore_index=self.ignore_index, reduction="sum")
        of_pixels = weights[labels.masked_fill(~valid, 0)].masked_fill(~valid, 0)
        return total / of_pixels.sum().clamp_min(torch.finfo(torch.float32).tiny)


class FocalLoss(PixelLoss):
    """Cross-entropy in which easy pixels fade as (1 - p)^gamma (arXiv:1708.02002); gamma 0 is cross-entropy.

    The paper's alpha is `class_weights`; the sum is divided by the pixels' weights, as for cross-entropy.
    """

    def __init__(self, ignore_index: int = 255, class_weights: list[float] | None = None, gamma: float = 2.0):
        super().__init__(ignore_index, class_weights)
        if gamma < 0:
            raise ValueError(f"the focal loss needs gamma >= 0, got {gamma}")
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        costs, weights = self.pixel_costs(logits, labels)
        missing = -torch.expm1(-costs)  # 1 - p of the true class, without cancellation
        # for gamma < 1 the slope of x^gamma is infinite at 0, where float32 puts well classified pixels
        return weighted_mean(missing.clamp_min(1e-6) ** self.gamma * costs, weights)


class OhemLoss(PixelLoss):
    """Cross-entropy over the hardest pixels of the batch (online hard example mining, arXiv:1604.03540).

    Args:
        fraction: the share of the valid pixels that is kept, those with the highest cost.
        min_kept: at least so many pixels are kept, or all where there are fewer.
    """

    def __init__(
        self,
        ignore_index: int = 255,
        class_weights: list[float] | None = None,
        fraction: float = 0.25,
        min_kept: int = 10_000,
    ):
        super().__init__(ignore_index, class_weights)
        if not 0 <= fraction <= 1 or min_kept < 0:
            raise ValueError(f"the OHEM loss needs 0 <= fraction <= 1 and min_kept >= 0, got {fraction} and {min_kept}")
        if fraction == 0 and min_kept == 0:
            raise ValueError("the OHEM loss keeps no pixel with fraction=0 and min_kept=0; raise one of them")
        self.fraction = fraction
        self.min_kept = min_kept

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        costs, weights = (values.flatten() for values in self.pixel_costs(logits, labels))
        valid = (labels != self.ignore_index).flatten()
        order = costs.detach().masked_fill(~valid, -1.0).argsort(descending=True)  # the ignored pixels come last
        keep = (valid.sum() * self.fraction).ceil().clamp_min(self.min_kept)
        kept = torch.arange(len(order), device=order.device) < keep
        return weighted_mean(costs[order], weights[order] * kept)


class OhemThresholdLoss(PixelLoss):
    """Cross-entropy over the pixels whose true class gets less than a probability (the OHEM of DeLiVER's recipes).

    Args:
        threshold: pixels count where the probability of their class lies below it.
        min_fraction: where fewer than this part of the valid pixels would count, so many of the costliest do.
    """

    def __init__(
        self,
        ignore_index: int = 255,
        class_weights: list[float] | None = None,
        threshold: float = 0.7,
        min_fraction: float = 1 / 16,
    ):
        super().__init__(ignore_index, class_weights)
        if not 0 < threshold <= 1 or not 0 <= min_fraction <= 1:
            raise ValueError(
                f"the OHEM loss needs 0 < threshold <= 1 and 0 <= min_fraction <= 1, got {threshold} and {min_fraction}"
            )
        self.threshold, self.min_fraction = threshold, min_fraction

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        costs, weights = (values.flatten() for values in self.pixel_costs(logits, labels))
        valid = (labels != self.ignore_index).flatten()
        ranked = costs.detach().masked_fill(~valid, -1.0).sort(descending=True)  # the ignored pixels come last
        hard = (ranked.values > -math.log(self.threshold)).sum()
        keep = torch.maximum(hard, (valid.sum() * self.min_fraction).floor())
        kept = torch.arange(ranked.indices.shape[0], device=costs.device) < keep
        return weighted_mean(costs[ranked.indices], weights[ranked.indices] * kept)


class DiceLoss(PixelLoss):
    """1 - Dice overlap of probabilities and labels (arXiv:1606.04797), a weighted mean over the classes in the batch.

    Overlap and areas are summed over the whole batch. A class that no label shows is left out: it has no overlap to
    gain, and its false positives already cost the classes they cover.

    Args:
        smooth: added above and below the fraction; larger values soften the loss of small objects.
    """

    def __init__(self, ignore_index: int = 255, class_weights: list[float] | None = None, smooth: float = 1.0):
        super().__init__(ignore_index, class_weights)
        if smooth < 0:
            raise ValueError(f"the Dice loss needs smooth >= 0, got {smooth}")
        self.smooth = smooth

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = at_least_float32(logits)
        valid = (labels != self.ignore_index).unsqueeze(1)
        probabilities = logits.softmax(dim=1).masked_fill(~valid, 0)
        classes = torch.arange(logits.shape[1], device=logits.device)
        truth = (labels.unsqueeze(1) == classes[:, None, None]) & valid  # (batch, num_labels, height, width)
        overlap = probabilities.masked_fill(~truth, 0).sum(dim=(0, 2, 3))  # (num_labels,)
        truth_area = truth.sum(dim=(0, 2, 3))
        areas = probabilities.sum(dim=(0, 2, 3)) + truth_area
        dice = (2 * overlap + self.smooth) / (areas + self.smooth).clamp_min(1e-6)
        return weighted_mean(1 - dice, self.weights_of_classes(logits) * (truth_area > 0))


LOSSES: dict[str, type[PixelLoss]] = {
    "cross_entropy": CrossEntropyLoss,
    "dice": DiceLoss,
    "focal": FocalLoss,
    "ohem": OhemLoss,
    "ohem_threshold": OhemThresholdLoss,
}


class SegmentationLoss(nn.Module):
    """Weighted sum of the losses named in a config; refuses labels that do not fit the logits.

    Args:
        losses: name of a loss -> its weight.
        loss_options: name of a loss -> its constructor's arguments.
        class_weights: one number per label, or None.
    """

    def __init__(
        self,
        num_labels: int,
        losses: dict[str, float],
        loss_options: dict[str, dict] | None = None,
        class_weights: list[float] | None = None,
        ignore_index: int = 255,
    ):
        super().__init__()
        if num_labels < 2:
            raise ValueError(
                f"expected at least two labels to tell apart, got num_labels={num_labels}; for one class against the"
                " rest use num_labels=2, with 0 for the rest"
            )
        loss_options = loss_options or {}
        if not losses or any(weight < 0 for weight in losses.values()) or not any(losses.values()):
            raise ValueError(
                f"losses must name at least one loss of positive weight and none of negative, got {losses}"
            )
        for name in loss_options:
            pick(losses, name, "key of loss_options (only losses that are in `losses` have options)")
        check_class_weights(class_weights, num_labels)
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.weights = dict(losses)
        self.terms = nn.ModuleDict()
        for name in losses:
            loss_class = pick(LOSSES, name, "loss")
            options = loss_options.get(name, {})
            check_options(loss_class, options, given=("ignore_index", "class_weights"), owner=f"the loss {name!r}")
            self.terms[name] = loss_class(ignore_index, class_weights, **options)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (batch, num_labels, height, width) and labels (batch, height, width) to a scalar."""
        check_labels(logits, labels, self.ignore_index)
        return sum(self.weights[name] * term(logits, labels) for name, term in self.terms.items())


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision becomes float32; float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of `values` under `weights`; 0, with a gradient, where all weights are 0."""
    return (values * weights).sum() / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)


def check_class_weights(class_weights: list[float] | None, num_labels: int) -> None:
    """Refuse weights that are not one finite number >= 0 per label."""
    if class_weights is None:
        return
    if len(class_weights) != num_labels:
        raise ValueError(f"class_weights needs one number per label, {num_labels} in all, got {len(class_weights)}")
    if not all(0 <= weight < float("inf") for weight in class_weights):
        raise ValueError(f"class_weights must be finite and not negative, got {list(class_weights)}")


def check_labels(logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    """Refuse labels of another shape or kind than the logits want, or with class ids outside the label set."""
    expected = (logits.shape[0], *logits.shape[2:])
    if labels.shape != expected:
        raise ValueError(
            f"expected labels (batch, height, width) of the images' size, {tuple(expected)}, got {tuple(labels.shape)};"
            " resize and crop image and mask together, the mask with nearest neighbours"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"expected integer class ids as labels, got {labels.dtype}; convert them with .long()")
    if torch.compiler.is_compiling():  # the test below depends on the values, which a compiled graph cannot branch on
        return
    num_labels = logits.shape[1]
    foreign = (labels != ignore_index) & ((labels < 0) | (labels >= num_labels))
    if foreign.any():
        raise ValueError(
            f"expected class ids 0 to {num_labels - 1} (num_labels={num_labels}) or ignore_index={ignore_index} as"
            f" labels, got {labels[foreign].unique().tolist()[:10]}; set num_labels or id2label to match, or relabel"
            " those pixels"
        )

"""Losses between predicted and measured depth.

Each takes prediction and target (batch, 1, height, width) of the same size, both metres or both inverse metres, and
gives a scalar. A target that is not positive marks a pixel without a measurement: it counts nowhere, and where nothing
is measured the loss is 0 and still has a gradient (of zeros).
"""

import logging

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.losses import at_least_float32, weighted_mean
from vitweave.modeling.options import check_options, pick

logger = logging.getLogger(__name__)

EPS = 1e-3  # metres; added before the logarithm, as in the published code
DEFAULT_LOSSES = {"metres": {"sig": 1.0}, "disparity": {"scale_shift_invariant": 1.0}}


def log_difference(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log(prediction) - log(target), 0 where the target is not positive, and the mask of valid pixels."""
    valid = target > 0
    difference = (prediction + EPS).log() - (target.where(valid, torch.ones_like(target)) + EPS).log()
    return difference.where(valid, torch.zeros_like(difference)), valid


def sig_loss(prediction: Tensor, target: Tensor, warm_up: bool | Tensor = False) -> Tensor:
    """Scale-aware logarithmic loss sqrt(Var(g) + 0.15 mean(g)^2), g the log difference (arXiv:1406.2283, as in DINOv2).

    Mean and unbiased variance are taken over the valid pixels of the whole batch.

    Args:
        warm_up: leave the variance out, as the published training does for its first 100 steps.
    """
    difference, valid = log_difference(prediction, target)
    count = valid.sum()
    mean = difference.sum() / count.clamp_min(1)
    spread = ((difference - mean) * valid).square().sum() / (count - 1).clamp_min(1)
    squared = spread * ~torch.as_tensor(warm_up, device=spread.device) + 0.15 * mean.square()
    positive = squared > 0  # the slope of a square root is infinite at 0
    return squared.where(positive, torch.ones_like(squared)).sqrt() * positive


def steps_between_neighbours(values: Tensor, seen: Tensor, distance: int) -> Tensor:
    """Sum of |difference| between pixels `distance` apart on height and width, both seen, over the last two axes."""
    rows = (values[..., distance:, :] - values[..., :-distance, :]).abs()
    columns = (values[..., distance:] - values[..., :-distance]).abs()
    rows = rows * (seen[..., distance:, :] & seen[..., :-distance, :])
    columns = columns * (seen[..., distance:] & seen[..., :-distance])
    return rows.sum(dim=(-2, -1)) + columns.sum(dim=(-2, -1))


def gradient_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Differences of the log difference between pixels two apart, at the steps 1, 2, 4 and 6 (the published ones).

    On height and width, as in DINOv3's code; DINOv2's slices the batch and channel axes instead.
    """
    difference, valid = log_difference(prediction, target)
    total = difference.sum() * 0
    for step in (1, 2, 4, 6):
        coarse, seen = difference[..., ::step, ::step], valid[..., ::step, ::step]
        total = total + steps_between_neighbours(coarse, seen, 2).sum() / seen.sum().clamp(min=1)
    return total


def l1_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of |prediction - target| over the valid pixels of the batch."""
    return weighted_mean((prediction - target).abs(), (target > 0).to(prediction.dtype))


def scale_shift_invariant_loss(
    prediction: Tensor, target: Tensor, gradient_weight: float = 0.5, gradient_scales: int = 4
) -> Tensor:
    """Squared error after each image's prediction is aligned to its target by least squares (MiDaS, arXiv:1907.01341).

    Half the mean square per image, then the mean over the images with a measurement, plus `gradient_weight` times the
    differences of neighbours in the residual at `gradient_scales` halved sizes. A least-squares scale may be negative,
    so that a prediction with near and far exchanged would count as right; here its absolute value is taken, which
    changes nothing for predictions that are ordered rightly on the whole.
    """
    valid = target > 0
    weights = valid.to(prediction.dtype)
    count = weights.sum(dim=(-2, -1), keepdim=True)  # (batch, 1, 1, 1)

    def centred(values: Tensor) -> tuple[Tensor, Tensor]:
        mean = (values * weights).sum(dim=(-2, -1), keepdim=True) / count.clamp_min(1)
        return (values - mean) * weights, mean

    (predicted, _), (measured, _) = centred(prediction), centred(target)
    covariance = (predicted * measured).sum(dim=(-2, -1), keepdim=True)
    variance = predicted.square().sum(dim=(-2, -1), keepdim=True)
    scale = covariance.abs() / variance.clamp_min(1e-10 * count.clamp_min(1))  # a constant prediction has no scale
    residual = scale * predicted - measured  # the shift makes the means equal, and 0 where nothing is measured
    cost = residual.square().sum(dim=(-2, -1)) / (2 * count.clamp_min(1)[..., 0, 0])  # (batch, 1)
    for step in [2**level for level in range(gradient_scales if gradient_weight else 0)]:
        coarse, seen = residual[..., ::step, ::step], valid[..., ::step, ::step]
        slopes = steps_between_neighbours(coarse, seen, 1) / seen.sum(dim=(-2, -1)).clamp_min(1)
        cost = cost + gradient_weight * slopes
    return weighted_mean(cost, (count[..., 0, 0] > 0).to(cost.dtype))


class SigLoss(nn.Module):
    """`sig_loss`, for the first `warm_up_steps` training steps without its variance (the published recipe has 100).

    The steps, forward passes in training mode, are counted in a buffer that is saved with the model, so that a resumed
    run goes on where it stopped.
    """

    def __init__(self, warm_up_steps: int = 0):
        super().__init__()
        if warm_up_steps < 0:
            raise ValueError(f"the loss 'sig' needs warm_up_steps >= 0, got {warm_up_steps}")
        self.warm_up_steps = warm_up_steps
        self.register_buffer("training_steps", torch.zeros((), dtype=torch.long))

    def fill_buffers(self):
        init.zeros_(self.training_steps)  # unlike torch's own, leaves loaded values as they are

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        if not self.training:
            return sig_loss(prediction, target)
        warm_up = self.training_steps < self.warm_up_steps
        loss = sig_loss(prediction, target, warm_up)
        self.training_steps += 1
        return loss


class GradientLoss(nn.Module):
    """`gradient_loss`; DINOv2 adds it to `sig` with weight 0.5."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return gradient_loss(prediction, target)


class ScaleShiftInvariantLoss(nn.Module):
    """`scale_shift_invariant_loss`, whose options are this one's."""

    def __init__(self, gradient_weight: float = 0.5, gradient_scales: int = 4):
        super().__init__()
        if gradient_weight < 0 or gradient_scales < 1:
            raise ValueError(
                "the loss 'scale_shift_invariant' needs gradient_weight >= 0 and gradient_scales >= 1, got"
                f" {gradient_weight} and {gradient_scales}"
            )
        self.gradient_weight, self.gradient_scales = gradient_weight, gradient_scales

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return scale_shift_invariant_loss(prediction, target, self.gradient_weight, self.gradient_scales)


class L1Loss(nn.Module):
    """`l1_loss`."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return l1_loss(prediction, target)


DEPTH_LOSSES: dict[str, type[nn.Module]] = {
    "gradient": GradientLoss,
    "l1": L1Loss,
    "scale_shift_invariant": ScaleShiftInvariantLoss,
    "sig": SigLoss,
}


class DepthLoss(nn.Module):
    """Weighted sum of the losses named in a config, over the pixels with a measurement.

    `images_without_depth` counts the training images that had none; it is saved with the model.

    Args:
        losses: name of a loss -> its weight; None is {"sig": 1.0} for metres and {"scale_shift_invariant": 1.0} for
            disparity.
        loss_options: name of a loss -> its constructor's arguments.
        depth_target: "metres" compares as it is; for "disparity" the labels become 1 / metres first.
        min_depth, max_depth: metres the model can predict; measurements outside are compared all the same, and told.
    """

    def __init__(
        self,
        losses: dict[str, float] | None = None,
        loss_options: dict[str, dict] | None = None,
        depth_target: str = "metres",
        min_depth: float = 0.001,
        max_depth: float = 10.0,
    ):
        super().__init__()
        losses, loss_options = DEFAULT_LOSSES[depth_target] if losses is None else losses, loss_options or {}
        if not losses or any(weight < 0 for weight in losses.values()) or not any(losses.values()):
            raise ValueError(
                f"losses must name at least one loss of positive weight and none of negative, got {losses}"
            )
        for name in loss_options:
            pick(losses, name, "key of loss_options (only losses that are in `losses` have options)")
        self.depth_target, self.min_depth, self.max_depth = depth_target, min_depth, max_depth
        self.weights = dict(losses)
        self.terms = nn.ModuleDict()
        for name in losses:
            loss_class = pick(DEPTH_LOSSES, name, "depth loss")
            check_options(loss_class, loss_options.get(name, {}), given=(), owner=f"the loss {name!r}")
            self.terms[name] = loss_class(**loss_options.get(name, {}))
        self.range_told = False
        self.register_buffer("images_without_depth", torch.zeros((), dtype=torch.long))

    def fill_buffers(self):
        init.zeros_(self.images_without_depth)

    def forward(self, prediction: Tensor, labels: Tensor) -> Tensor:
        """Predictions (batch, 1, height, width) and labels (batch, height, width) in metres to a scalar."""
        prediction, labels = at_least_float32(prediction), at_least_float32(labels)[:, None]
        valid = labels.isfinite() & (labels > 0)
        if self.training:
            self.images_without_depth += (~valid.flatten(1).any(dim=1)).sum()
        self.tell_range(labels, valid)
        target = labels.where(valid, torch.ones_like(labels))
        target = target.reciprocal() if self.depth_target == "disparity" else target
        target = target.to(prediction.dtype).masked_fill(~valid, 0)
        return sum(self.weights[name] * term(prediction, target) for name, term in self.terms.items())

    def tell_range(self, labels: Tensor, valid: Tensor):
        """Warn, once, of measurements that the model cannot predict."""
        # a compiled graph cannot branch on values
        if self.range_told or self.depth_target == "disparity" or torch.compiler.is_compiling():
            return
        outside = valid & ((labels < self.min_depth) | (labels > self.max_depth))
        if outside.any():
            self.range_told = True
            depths = labels[valid]
            logger.warning(
                "expected depths of %g to %g metres (min_depth, max_depth), got %g to %g, with %.1f %% of the measured"
                " pixels outside; they count in the loss, though the model cannot reach them. Set min_depth and"
                " max_depth to the data's range, give pixels without a measurement the value 0, and check the unit:"
                " labels are metres, not millimetres",
                *(self.min_depth, self.max_depth, depths.min(), depths.max()),
                100 * outside.sum() / valid.sum(),
            )


def check_depth_labels(labels: Tensor, batch_size: int):
    """Refuse labels that are no batch of depth maps in metres."""
    if labels.ndim != 3 or labels.shape[0] != batch_size:
        raise ValueError(
            f"expected labels (batch, height, width) for {batch_size} images, got {tuple(labels.shape)};"
            " (batch, 1, height, width) needs labels[:, 0]"
        )
    if not labels.is_floating_point():
        raise ValueError(
            f"expected depth in metres as floating-point labels, got {labels.dtype}; a stored 16-bit map must be scaled"
            " first, e.g. labels.float() / 1000 from millimetres"
        )

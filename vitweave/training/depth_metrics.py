"""Figures of merit of predicted depth, averaged per image and then over the images, under a named protocol."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitweave.training.depth_protocols import DepthProtocol, find_protocol

DEPTH_METRICS = ("abs_rel", "sq_rel", "rmse", "log10", "rmse_log", "silog", "a1", "a2", "a3")
# Pixels at a time: the buffers then stay in the cache, which is worth a factor of 3. In float64 less, since OpenBLAS
# starts threads for a `ddot` of more than 10,000 numbers, and waits for them on a busy machine.
BLOCK = {"float32": 65536, "float64": 8192}
NUM_SUMS = 10


def as_array(values) -> np.ndarray:
    """A tensor or array as a float32 or float64 array on the CPU."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values if values.dtype == torch.float64 else values.float()).numpy()
    values = np.asarray(values)
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float32)


class DepthSums:
    """What every metric follows from, summed over the counted pixels of an image in one sweep.

    With d = p - t, r = d / t and g = log2(p / t), these are: the number of pixels, the sums of d^2, d r, |r|, g, g^2
    and |g|, and how often |g| < k log2(1.25), which is max(p / t, t / p) < 1.25^k. A block is summed in the dtype of
    the input, the blocks in float64.
    """

    def __init__(self, dtype: np.dtype, min_depth: float = 0.0, max_depth: float = math.inf, clamp: bool = True):
        self.dtype, self.low, self.high, self.clamp = dtype, dtype.type(min_depth), dtype.type(max_depth), clamp
        self.limits = np.log2(np.array([1.25, 1.25**2, 1.25**3], dtype=dtype))
        self._make_buffers(0)

    def _make_buffers(self, size: int) -> None:
        self.floats = np.empty((5, size), dtype=self.dtype)
        self.bools = np.empty((2, size), dtype=bool)
        self.ones = np.ones(size, dtype=self.dtype)

    def __call__(self, prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Sums (NUM_SUMS,) of one image; both (height, width) of the dtype, possibly windows of larger arrays."""
        with np.errstate(all="ignore"):  # a prediction that is not finite shows in the metrics
            total = self._sweep(prediction, target)
            if not np.isfinite(total).all():  # NaN may also stem from pixels that do not count: leave those out
                counted = (target > self.low) & (target < self.high)
                total = self._sweep(prediction[counted][None], target[counted][None])
        return total

    def _sweep(self, prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
        height, width = target.shape
        rows = max(1, BLOCK[self.dtype.name] // max(1, width))
        if rows * width > len(self.ones):
            self._make_buffers(rows * width)
        total = np.zeros(NUM_SUMS)
        for first in range(0, height, rows):
            total += self._block(prediction[first : first + rows], target[first : first + rows])
        return total

    def _block(self, prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
        shape, size = target.shape, target.size
        *pair, difference, relative, g = (buffer[:size].reshape(shape) for buffer in self.floats)
        for packed, window in zip(pair, (prediction, target), strict=True):
            np.copyto(packed, window)  # a window's rows lie apart: one copy is cheaper than a dozen steps over them
        prediction, target = pair
        counted, scratch = (buffer[:size].reshape(shape) for buffer in self.bools)
        nearest, farthest = target.min(), target.max()  # cheap to know, and they save most of the steps below
        count = size
        if not (nearest > self.low and farthest < self.high):
            np.greater(target, self.low, out=counted)
            if not farthest < self.high:
                np.logical_and(counted, np.less(target, self.high, out=scratch), out=counted)
            count = np.count_nonzero(counted)
        if not count:
            return np.zeros(NUM_SUMS)
        if self.clamp and not (prediction.min() >= self.low and prediction.max() <= self.high):
            prediction = np.clip(prediction, self.low, self.high, out=difference)
        np.subtract(prediction, target, out=difference)
        if count < size:  # pixels that do not count get d = 0 and t = 1, and add nothing to any sum
            mask = g
            np.copyto(mask, counted)
            difference *= mask
            target = np.multiply(target, mask, out=relative)
            target += np.subtract(1, mask, out=mask)
        np.divide(difference, target, out=relative)
        np.log2(np.add(relative, 1, out=g), out=g)
        return self._sums(count, difference.reshape(-1), relative.reshape(-1), g.reshape(-1), scratch.reshape(-1))

    def _sums(self, count: int, difference: np.ndarray, relative: np.ndarray, g: np.ndarray, scratch: np.ndarray):
        ones, idle = self.ones[: len(g)], len(g) - count
        sums = [count, difference @ difference, difference @ relative]
        sums += [np.abs(relative, out=relative) @ ones, g @ ones, g @ g]
        np.abs(g, out=g)
        near = [np.count_nonzero(np.less(g, limit, out=scratch)) - idle for limit in self.limits]
        return np.array([*sums, g @ ones, *near], dtype=np.float64)


def metrics_of(sums: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics (images,) of each image's sums (images, NUM_SUMS); NaN where no pixel counts."""
    with np.errstate(invalid="ignore", divide="ignore"):
        square, square_relative, relative, g, g_square, g_abs, *near = (sums[:, 1:] / sums[:, :1]).T
        return {
            "abs_rel": relative,
            "sq_rel": square_relative,
            "rmse": np.sqrt(square),
            "log10": g_abs * math.log10(2),
            "rmse_log": np.sqrt(g_square) * math.log(2),
            "silog": 100 * math.log(2) * np.sqrt(np.maximum(g_square - g**2, 0)),
            **dict(zip(("a1", "a2", "a3"), near, strict=True)),
        }


def depth_metrics(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """The metrics over all pixels at once, without a protocol: no crop, no cap, no clamping.

    abs_rel = mean |p - t| / t, sq_rel = mean (p - t)^2 / t, rmse (metres), log10 = mean |log10 p - log10 t|, rmse_log
    (natural logarithm), silog = 100 times the standard deviation of log p - log t, and a1 to a3, the share of pixels
    within a factor 1.25, 1.25^2, 1.25^3.

    Args:
        prediction, target: equal shapes, metres; pixels with target <= 0 have no value and do not count.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"expected equal shapes, got {tuple(prediction.shape)} and {tuple(target.shape)}; resize first"
        )
    prediction, target = as_array(prediction), as_array(target)
    dtype = np.result_type(prediction, target)
    prediction, target = (values.astype(dtype, copy=False).reshape(1, -1) for values in (prediction, target))
    found = metrics_of(DepthSums(dtype, clamp=False)(prediction, target)[None])
    return {name: float(value[0]) for name, value in found.items()}


class DepthMetrics:
    """Metrics of a whole evaluation, image by image; memory does not grow with the images.

    Also `compute_metrics` of the Trainer with `batch_eval_metrics=True`. The Trainer's logs hold numbers only, so there
    the protocol's name is part of each number's name: `nyu_eigen_abs_rel`, which `metric_for_best_model` takes as well.

    Args:
        protocol: a name of `DEPTH_PROTOCOLS`, or a protocol.
    """

    def __init__(self, protocol: str | DepthProtocol = "nyu_eigen"):
        self.protocol = find_protocol(protocol)
        self.sums_of = {
            dtype: DepthSums(dtype, self.protocol.min_depth, self.protocol.max_depth)
            for dtype in (np.dtype(np.float32), np.dtype(np.float64))
        }
        self.reset()

    def reset(self) -> None:
        self.totals = dict.fromkeys(DEPTH_METRICS, 0.0)
        self.images = self.images_without_depth = 0

    def update(self, predictions, labels) -> None:
        """Add predicted depth and labels of equal shape, (batch, height, width) or (height, width), tensors or arrays.

        Labels are metres, 0 or less where nothing was measured. Images in which no pixel counts are only counted.
        """
        found, counted = self.per_image(predictions, labels)
        self.images += int(counted.sum())
        self.images_without_depth += int((~counted).sum())
        for name, values in found.items():
            self.totals[name] += float(values[counted].sum())

    def per_image(self, predictions, labels) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The metrics of every image by itself, 0 where no pixel counts, and whether any does; see `update`."""
        predictions, labels = as_array(predictions), as_array(labels)
        if predictions.shape != labels.shape or labels.ndim not in (2, 3):
            raise ValueError(
                "expected predictions and labels of one shape (batch, height, width), got "
                f"{predictions.shape} and {labels.shape}; predicted_depth_at_labels resizes predictions"
            )
        dtype = np.result_type(predictions, labels)
        predictions, labels = (values.astype(dtype, copy=False) for values in (predictions, labels))
        window = self.protocol.window(*labels.shape[-2:])
        sums_of = self.sums_of[dtype]
        if labels.ndim == 2:
            predictions, labels = predictions[None], labels[None]
        predictions, labels = predictions[(slice(None), *window)], labels[(slice(None), *window)]
        pairs = zip(predictions, labels, strict=True)
        sums = np.array([sums_of(self.protocol.aligned(p, t), t) for p, t in pairs]).reshape(-1, NUM_SUMS)
        counted = sums[:, 0] > 0
        found = {name: np.zeros(len(sums)) for name in DEPTH_METRICS}
        for name, values in metrics_of(sums[counted]).items():
            found[name][counted] = values
        return found, counted

    def compute(self) -> dict[str, float | int | str]:
        """`protocol`, the metrics (NaN if no image has depth), `images` counted in them, and `images_without_depth`."""
        means = {name: total / self.images if self.images else math.nan for name, total in self.totals.items()}
        counts = {"images": self.images, "images_without_depth": self.images_without_depth}
        return {"protocol": self.protocol.name, **means, **counts}

    def __call__(self, prediction, compute_result: bool = True) -> dict[str, float]:
        if self.protocol.flip:
            raise ValueError(
                f"{self.protocol.name} averages with the mirrored image, which the Trainer does not predict; use "
                "evaluate_depth, or a protocol without flip while training"
            )
        self.update(prediction.predictions, prediction.label_ids)
        if not compute_result:
            return {}
        metrics = self.compute()
        self.reset()
        name = metrics.pop("protocol")
        return {f"{name}_{key}": value for key, value in metrics.items()}


def predicted_depth_at_labels(predicted_depth, labels: Tensor) -> Tensor:
    """`preprocess_logits_for_metrics` of the Trainer: predicted depth (batch, height, width) at the labels' size."""
    depth = predicted_depth[0] if isinstance(predicted_depth, (tuple, list)) else predicted_depth
    if depth.shape[-2:] != labels.shape[-2:]:
        depth = F.interpolate(depth[:, None], size=labels.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return depth

"""Segmentation metrics from one streaming confusion matrix."""

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING_INDEX = -100  # the Trainer fills labels with it when processes hold images of different size


def bounds(values: Tensor) -> tuple[int, int]:
    """Lowest and highest value."""
    low, high = values.aminmax()
    return int(low), int(high)


class ConfusionMatrix:
    """Counts of (true class, predicted class) over every pixel seen so far; memory does not grow with the images."""

    def __init__(self, num_labels: int, ignore_index: int = 255):
        self.num_labels, self.ignore_index = num_labels, ignore_index
        self.reset()

    def reset(self) -> None:
        self.counts = torch.zeros(self.num_labels, self.num_labels, dtype=torch.int64)  # (true, predicted)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add class maps of equal shape, (height, width) or (batch, height, width); ignored pixels are left out."""
        predictions, labels = torch.as_tensor(predictions), torch.as_tensor(labels)
        if predictions.shape != labels.shape:
            raise ValueError(
                f"expected predictions as large as the labels, got {tuple(predictions.shape)} and {tuple(labels.shape)}"
                "; resize the logits to the labels first"
            )
        if not labels.numel():
            return
        size, rows = self.num_labels, max(self.num_labels + 1, 256)
        predictions, labels, ignored_row = predictions.flatten().int(), labels.flatten().int(), self.ignore_index
        low, high = bounds(labels)
        if low < 0 or high >= rows:  # rare: padding of the Trainer, or an ignore index beyond the rows
            labels = labels.masked_fill((labels == self.ignore_index) | (labels == PADDING_INDEX), size)
            (low, high), ignored_row = bounds(labels), size
            if low < 0 or high > size:
                raise ValueError(self._range_message("labels", low, high))
        low, high = bounds(predictions)
        if low < 0 or high >= size:
            raise ValueError(self._range_message("predictions", low, high))
        # every label has a row of its own, also the ignored one: dropping rows is cheaper than selecting pixels
        index = torch.add(predictions, labels, alpha=size)
        counts = torch.bincount(index, minlength=rows * size).view(rows, size).to(self.counts.device)
        if 0 <= ignored_row < rows:
            counts[ignored_row] = 0
        if counts[size:].sum():
            foreign = counts[size:].sum(dim=1).nonzero().flatten() + size
            raise ValueError(self._range_message("labels", int(foreign.min()), int(foreign.max())))
        self.counts += counts[:size]

    def _range_message(self, name: str, low: int, high: int) -> str:
        return (
            f"expected {name} from 0 to {self.num_labels - 1} or {self.ignore_index} (ignored), got {low} to {high}; "
            "check num_labels and ignore_index"
        )

    def compute(self) -> dict:
        """mean_iou, pixel_accuracy, mean_accuracy, and per_class_iou (num_labels values, NaN for absent classes)."""
        counts = self.counts.double()
        hits, true, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
        union = true + predicted - hits
        iou = hits / union  # 0 / 0 = NaN: a class that neither occurs nor is predicted has no IoU
        return {
            "mean_iou": iou.nanmean().item(),
            "pixel_accuracy": (hits.sum() / counts.sum()).item(),
            "mean_accuracy": (hits / true).nanmean().item(),
            "per_class_iou": iou.tolist(),
        }


def predicted_classes(logits, labels: Tensor) -> Tensor:
    """`preprocess_logits_for_metrics` of the Trainer: class maps (batch, height, width) at the size of the labels."""
    logits = logits[0] if isinstance(logits, (tuple, list)) else logits
    if logits.shape[-2:] != labels.shape[-2:]:
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return logits.argmax(dim=1)


class SegmentationMetrics:
    """`compute_metrics` of the Trainer with `batch_eval_metrics=True`: between batches it keeps one confusion matrix.

    Args:
        id2label: names under which the IoU of each class is reported as `iou_<name>`.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255, id2label: dict[int, str] | None = None):
        self.confusion = ConfusionMatrix(num_labels, ignore_index)
        self.names = [(id2label or {}).get(index, str(index)) for index in range(num_labels)]

    def __call__(self, prediction, compute_result: bool = True) -> dict[str, float]:
        self.confusion.update(prediction.predictions, prediction.label_ids)
        if not compute_result:
            return {}
        metrics = self.confusion.compute()
        self.confusion.reset()
        per_class = metrics.pop("per_class_iou")
        return {**metrics, **{f"iou_{name}": iou for name, iou in zip(self.names, per_class, strict=True)}}

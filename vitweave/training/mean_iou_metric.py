"""Mean IoU as an `evaluate` metric that needs no download; the Trainer is better served by `SegmentationMetrics`."""

import datasets
import evaluate

from vitweave.training.metrics import ConfusionMatrix


class MeanIoU(evaluate.Metric):
    """`MeanIoU(num_labels=..., ignore_index=...)`, then `add_batch(predictions=..., references=...)` and `compute()`.

    Gives what the Hub's `mean_iou` gives, without reaching the Hub; `evaluate` stores every map until `compute`.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255, **kwargs):
        self.num_labels, self.ignore_index = num_labels, ignore_index
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        class_map = datasets.Sequence(datasets.Sequence(datasets.Value("int32")))  # (height, width)
        return evaluate.MetricInfo(
            description="Mean intersection over union of class maps.",
            citation="",
            inputs_description="predictions and references: lists of class maps of shape (height, width).",
            features=datasets.Features({"predictions": class_map, "references": class_map}),
        )

    def _compute(self, predictions, references) -> dict:
        confusion = ConfusionMatrix(self.num_labels, self.ignore_index)
        for prediction, reference in zip(predictions, references, strict=True):
            confusion.update(prediction, reference)
        return confusion.compute()

"""Evaluation of a segmentation model; memory does not grow with the images."""

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitweave.processing.sliding_window import sliding_window_logits
from vitweave.training.metrics import ConfusionMatrix, predicted_classes
from vitweave.training.modes import evaluating
from vitweave.training.paired_data import collate_pairs
from vitweave.training.segmentation import checked_ignore_index


def evaluate_segmentation(
    model, dataset: Dataset, batch_size: int = 8, window: int | None = None, stride: int | None = None
) -> dict:
    """Metrics at the size of the labels, where the model is.

    Args:
        dataset: items with `pixel_values`, `labels` and what else the model reads, without augmentation.
        batch_size: 1 for images of different sizes.
        window, stride: pixels of overlapping windows, for images larger than what the model was trained on; the stride
            is 2/3 of the window unless given.

    Returns:
        mean_iou, pixel_accuracy, mean_accuracy and per_class_iou.
    """
    ignore_index = checked_ignore_index(model.config, getattr(dataset, "processor", None))
    confusion = ConfusionMatrix(model.config.num_labels, ignore_index)
    weight = next(model.parameters())

    def on_device(values: Tensor) -> Tensor:
        return values.to(weight.device, weight.dtype if values.is_floating_point() else values.dtype)

    def logits_of(pixel_values: Tensor, **others: Tensor) -> Tensor:
        if window is None:
            return model(pixel_values=pixel_values, **others).logits
        return sliding_window_logits(model, pixel_values, window, stride or -(-2 * window // 3))

    with evaluating(model):
        for batch in DataLoader(dataset, batch_size, collate_fn=collate_pairs):
            inputs = {name: on_device(values) for name, values in batch.items()}
            labels = inputs.pop("labels")
            confusion.update(predicted_classes(logits_of(**inputs), labels), labels)
    return confusion.compute()

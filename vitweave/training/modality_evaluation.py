"""Segmentation of several sensors, evaluated with some of them hidden; memory does not grow with the images."""

import copy
from collections.abc import Sequence

from vitweave.training.modality_data import ModalityDataset
from vitweave.training.segmentation_evaluation import evaluate_segmentation


def evaluate_modalities(
    model, dataset: ModalityDataset, keep: Sequence[str] | None = None, batch_size: int = 8
) -> dict[str, float]:
    """Metrics of a model that sees only the modalities in `keep`; None is all that are there.

    Returns:
        mean_iou, pixel_accuracy, mean_accuracy and per_class_iou.
    """
    shown = copy.copy(dataset)
    shown.keep = keep
    return evaluate_segmentation(model, shown, batch_size)

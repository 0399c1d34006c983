"""Segmentation of several sensors, evaluated with some of them hidden; memory does not grow with the images."""

import copy
from collections.abc import Sequence

from torch.utils.data import DataLoader

from vitweave.training.metrics import ConfusionMatrix, predicted_classes
from vitweave.training.modality_data import ModalityDataset
from vitweave.training.modes import evaluating
from vitweave.training.paired_data import collate_pairs


def evaluate_modalities(
    model, dataset: ModalityDataset, keep: Sequence[str] | None = None, batch_size: int = 8
) -> dict[str, float]:
    """Metrics of a model that sees only the modalities in `keep`; None is all that are there.

    Returns:
        mean_iou, pixel_accuracy, mean_accuracy and per_class_iou.
    """
    shown = copy.copy(dataset)
    shown.keep = keep
    confusion = ConfusionMatrix(model.config.num_labels, model.config.semantic_loss_ignore_index)
    with evaluating(model):
        for batch in DataLoader(shown, batch_size, collate_fn=collate_pairs):
            labels = batch.pop("labels").to(model.device)
            outputs = model(**{name: part.to(model.device) for name, part in batch.items()})
            confusion.update(predicted_classes(outputs.logits, labels), labels)
    return confusion.compute()

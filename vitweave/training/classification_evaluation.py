"""Evaluation of an image classifier; memory does not grow with the images."""

from torch.utils.data import DataLoader, Dataset

from vitweave.training.classification_data import collate_classification
from vitweave.training.classification_metrics import Accuracy, RankedClasses
from vitweave.training.modes import evaluating


def evaluate_classification(model, dataset: Dataset, batch_size: int = 16) -> dict:
    """Metrics where the model is, of items with `pixel_values` and `labels`, without augmentation.

    Returns:
        accuracy, mean_class_accuracy, per_class and, of more than 5 classes, top5_accuracy.
    """
    accuracy, ranked = Accuracy(model.config.num_labels), RankedClasses()
    weight = next(model.parameters())
    with evaluating(model):
        for batch in DataLoader(dataset, batch_size, collate_fn=collate_classification):
            logits = model(pixel_values=batch["pixel_values"].to(weight.device, weight.dtype)).logits
            accuracy.update(ranked(logits).cpu(), batch["labels"])
    return accuracy.compute()

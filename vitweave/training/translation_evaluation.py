"""Evaluation of an image-to-image model; memory does not grow with the images."""

from torch.utils.data import DataLoader, Dataset

from vitweave.training.modes import evaluating
from vitweave.training.paired_data import collate_pairs
from vitweave.training.translation_metrics import TranslationMetrics


def evaluate_translation(model, dataset: Dataset, batch_size: int = 8) -> dict[str, float]:
    """How near the images drawn are to the real ones, at the size of the processor, where the model is.

    Args:
        model: returns `.reconstruction` (batch, channels, height, width) in [-1, 1].
        dataset: a `TranslationDataset` without augmentation, or any dataset with its items.
        batch_size: 1 for images of different sizes.

    Returns:
        mae, mse, psnr and ssim, see `translation_metrics`.
    """
    metrics, weight = TranslationMetrics(), next(model.parameters())
    with evaluating(model):
        for batch in DataLoader(dataset, batch_size, collate_fn=collate_pairs):
            pixels = batch["pixel_values"].to(weight.device, weight.dtype)
            drawn = model(pixel_values=pixels, modality_mask=batch["modality_mask"].to(weight.device)).reconstruction
            metrics.update(drawn.cpu(), batch["labels"])
    return metrics.compute()

"""Images with class maps, from folders or from `datasets`, as the Trainer wants them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from vitweave.training.paired_data import PairedDataset, PairedFolder, collate_pairs


class FolderSamples(PairedFolder):
    """Pairs of `<folder>/image/<name>.*` and `<folder>/label/<name>.png`, sorted by name."""

    map_folder = "label"


def read_id2label(folder: str | Path) -> dict[int, str] | None:
    """Class names from `<folder>/meta.json` (`{"id2label": {"0": "sky", ...}}`), or None without that file."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        return None
    return {int(index): name for index, name in json.loads(path.read_text())["id2label"].items()}


def balanced_class_weights(
    label_maps: Iterable, num_labels: int, power: float = 0.5, ignore_index: int = 255
) -> list[float]:
    """Weights that let rare classes count: pixels of a class to the power `-power`, 1 for the average labelled pixel.

    Args:
        label_maps: class maps, pictures or arrays (height, width), of the training split.
        power: 0 weighs all pixels alike, 1 all classes. A class without pixels gets the weight of the rarest.
    """
    counts = np.zeros(num_labels, dtype=np.int64)
    for label_map in label_maps:
        labels = np.asarray(label_map)
        labels = labels[labels != ignore_index]
        if labels.size and (labels.min() < 0 or labels.max() >= num_labels):
            raise ValueError(f"expected class ids below {num_labels}, got {int(labels.max())}; set num_labels to match")
        counts += np.bincount(labels, minlength=num_labels)
    if not counts.any():
        raise ValueError("expected label maps with labelled pixels, got none")
    weights = counts.clip(counts[counts > 0].min()).astype(np.float64) ** -power
    return (weights / (weights * counts).sum() * counts.sum()).tolist()


class SegmentationDataset(PairedDataset):
    """`{"pixel_values": (channels, height, width), "labels": (height, width)}` per sample.

    Args:
        samples: anything with a length whose items are dicts of a picture and a class map: a `datasets.Dataset`, a
            `FolderSamples`, a list.
        processor: a segmentation image processor.
        augmentation: called as `augmentation(image, mask, epoch, index)`; None for evaluation. What it returns is not
            resized again if it crops to a fixed size.
        num_labels: refuse class ids outside [0, num_labels); the recipe fills it in from the model.
    """

    folder_samples = FolderSamples

    def __init__(
        self,
        samples: Sequence,
        processor,
        augmentation=None,
        num_labels: int | None = None,
        image_column: str = "image",
        label_column: str = "label",
    ):
        super().__init__(samples, processor, augmentation, image_column, label_column)
        self.num_labels = num_labels

    def process(self, image, label, index: int) -> dict[str, torch.Tensor]:
        image, label, options = self.augmented(image, label, index)
        if self.num_labels:
            options["num_labels"] = self.num_labels
        return self.processor(image, label, return_tensors="pt", **options)


collate_segmentation = collate_pairs

"""Images with class maps, from folders or from `datasets`, as the Trainer wants them."""

import json
from collections.abc import Sequence
from pathlib import Path

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

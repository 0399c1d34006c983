"""Images with boxes, read off class maps, as transformers' detectors and the Trainer want them."""

from collections.abc import Mapping, Sequence

import PIL.Image
import torch

from vitweave.processing.boxes import boxes_from_mask, coco_annotations
from vitweave.processing.image_steps import picture_to_rgb
from vitweave.training.paired_data import PairedDataset, collate_pairs
from vitweave.training.segmentation_data import FolderSamples


class DetectionDataset(PairedDataset):
    """`{"pixel_values": (channels, height, width), "labels": {"class_labels", "boxes", ...}}` per sample.

    The augmentation acts on image and class map; the boxes are read off what comes out, so they always fit.

    Args:
        samples: anything with a length whose items are dicts of a picture and a class map: a `datasets.Dataset`, a
            `FolderSamples`, a list.
        processor: a detection image processor of transformers, e.g. `RTDetrImageProcessorPil`.
        augmentation: called as `augmentation(image, mask, epoch, index)`; None for evaluation.
        classes: class id in the map -> class id of the boxes, see `boxes_from_mask`.
        border: class id of the pixels around every object, or None.
        min_size: of a box, in pixels of the augmented picture.
    """

    folder_samples = FolderSamples

    def __init__(
        self,
        samples: Sequence,
        processor,
        augmentation=None,
        *,
        classes: Mapping[int, int],
        border: int | None = None,
        min_size: int = 2,
        image_column: str = "image",
        label_column: str = "label",
    ):
        super().__init__(samples, processor, augmentation, image_column, label_column)
        self.classes, self.border, self.min_size = dict(classes), border, min_size

    def process(self, image, label, index: int) -> dict:
        image, label, options = self.augmented(image, label, index)
        boxes, labels = boxes_from_mask(label, self.classes, self.border, self.min_size)
        annotations = coco_annotations(boxes, labels, index)
        image = picture_to_rgb(image) if isinstance(image, PIL.Image.Image) else image
        return self.processor(image, annotations, return_tensors="pt", **options)


def collate_detection(samples: list[dict]) -> dict[str, torch.Tensor | list]:
    """Stack images of one size into `pixel_values` (batch, channels, height, width); `labels` is a list of dicts."""
    images = collate_pairs([{"pixel_values": sample["pixel_values"]} for sample in samples])
    return {**images, "labels": [dict(sample["labels"]) for sample in samples]}

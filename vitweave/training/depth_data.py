"""Images with depth maps, from folders or from `datasets`, as the Trainer wants them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vitweave.processing.depth_maps import DEPTH_SUFFIXES, read_depth_file
from vitweave.processing.depth_steps import IN_METRES
from vitweave.training.paired_data import PairedDataset, PairedFolder, collate_pairs


class DepthFolderSamples(PairedFolder):
    """Pairs of `<folder>/rgb/<name>.*` (or `image/`) and `<folder>/depth/<name>.*` (PNG, TIFF, .npy)."""

    image_folders = ("rgb", "image")
    map_folder = "depth"
    map_suffixes = DEPTH_SUFFIXES

    def open_map(self, path: Path) -> np.ndarray:
        """The stored numbers; the processor knows their unit."""
        return read_depth_file(path)


class DepthDataset(PairedDataset):
    """`{"pixel_values": (channels, height, width), "labels": (height, width) metres, 0 = no measurement}` per sample.

    Args:
        samples: anything with a length whose items are dicts of a picture and a depth map (picture, array, tensor or
            path): a `datasets.Dataset`, a `DepthFolderSamples`, a list.
        processor: a depth image processor; it holds the unit and the range of the stored depth.
        augmentation: called as `augmentation(image, metres, epoch, index)`; None for evaluation. What it returns is not
            resized again if it crops to a fixed size.
    """

    folder_samples = DepthFolderSamples

    def __init__(
        self,
        samples: Sequence,
        processor,
        augmentation=None,
        image_column: str = "image",
        label_column: str = "depth",
    ):
        if not hasattr(processor, "read_depth"):
            raise ValueError(
                f"expected a DepthImageProcessor or DepthImageProcessorPil, got {type(processor).__name__}"
            )
        super().__init__(samples, processor, augmentation, image_column, label_column)

    def process(self, image, depth, index: int) -> dict[str, torch.Tensor]:
        metres = self.processor.read_depth(depth)
        image, metres, options = self.augmented(image, metres, index)
        return self.processor(image, metres, return_tensors="pt", **IN_METRES, **options)


collate_depth = collate_pairs

"""Segmentation images and masks to tensors, with PIL and numpy."""

from vitweave.processing.pil_steps import PilSteps
from vitweave.processing.segmentation_steps import SegmentationImageProcessorKwargs, SegmentationSteps


class SegmentationImageProcessorPil(SegmentationSteps, PilSteps):
    """Image and mask to `pixel_values` and `labels`, without torchvision."""

    valid_kwargs = SegmentationImageProcessorKwargs


__all__ = ["SegmentationImageProcessorKwargs", "SegmentationImageProcessorPil"]

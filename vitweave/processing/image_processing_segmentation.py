"""Segmentation images and masks to tensors, with torchvision."""

from vitweave.processing.segmentation_steps import SegmentationImageProcessorKwargs, SegmentationSteps
from vitweave.processing.torchvision_steps import TorchvisionSteps


class SegmentationImageProcessor(SegmentationSteps, TorchvisionSteps):
    """Image and mask to `pixel_values` and `labels`; `SegmentationImageProcessorPil` does so without torchvision."""

    valid_kwargs = SegmentationImageProcessorKwargs


__all__ = ["SegmentationImageProcessor", "SegmentationImageProcessorKwargs"]

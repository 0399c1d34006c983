"""Images and depth maps to tensors, with torchvision."""

from vitweave.processing.depth_steps import DepthImageProcessorKwargs, DepthSteps
from vitweave.processing.torchvision_steps import TorchvisionSteps


class DepthImageProcessor(DepthSteps, TorchvisionSteps):
    """Image and depth map to `pixel_values` and `labels` in metres; `DepthImageProcessorPil` needs no torchvision."""

    valid_kwargs = DepthImageProcessorKwargs


__all__ = ["DepthImageProcessor", "DepthImageProcessorKwargs"]

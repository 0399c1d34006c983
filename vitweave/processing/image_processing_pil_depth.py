"""Images and depth maps to tensors, with PIL and numpy."""

from vitweave.processing.depth_steps import DepthImageProcessorKwargs, DepthSteps
from vitweave.processing.pil_steps import PilSteps


class DepthImageProcessorPil(DepthSteps, PilSteps):
    """Image and depth map to `pixel_values` and `labels` in metres, without torchvision."""

    valid_kwargs = DepthImageProcessorKwargs


__all__ = ["DepthImageProcessorKwargs", "DepthImageProcessorPil"]

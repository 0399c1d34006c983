"""Scientific figures to tensors, with torchvision."""

from vitweave.processing.figure_steps import FigureImageProcessorKwargs, FigureSteps
from vitweave.processing.torchvision_steps import TorchvisionSteps


class FigureImageProcessor(FigureSteps, TorchvisionSteps):
    """Whole figures to `pixel_values` and `patch_mask`; `FigureImageProcessorPil` needs no torchvision."""

    resample = FigureSteps.resample
    valid_kwargs = FigureImageProcessorKwargs


__all__ = ["FigureImageProcessor", "FigureImageProcessorKwargs"]

"""Scientific figures to tensors, with PIL and numpy."""

from vitweave.processing.figure_steps import FigureImageProcessorKwargs, FigureSteps
from vitweave.processing.pil_steps import PilSteps


class FigureImageProcessorPil(FigureSteps, PilSteps):
    """Whole figures to `pixel_values` and `patch_mask`, without torchvision."""

    resample = FigureSteps.resample
    valid_kwargs = FigureImageProcessorKwargs


__all__ = ["FigureImageProcessorKwargs", "FigureImageProcessorPil"]

"""Images of encoder towers to tensors, with PIL and numpy."""

from vitweave.processing.multi_encoder_steps import MultiEncoderImageProcessorKwargs, MultiEncoderSteps
from vitweave.processing.pil_steps import PilSteps


class MultiEncoderImageProcessorPil(MultiEncoderSteps, PilSteps):
    """Padded or tiled images to `pixel_values`, `num_tiles` and `image_sizes`, resized as released weights saw them."""

    resample = MultiEncoderSteps.resample
    valid_kwargs = MultiEncoderImageProcessorKwargs


__all__ = ["MultiEncoderImageProcessorKwargs", "MultiEncoderImageProcessorPil"]

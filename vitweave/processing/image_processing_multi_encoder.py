"""Images of encoder towers to tensors, with torchvision."""

from vitweave.processing.multi_encoder_steps import MultiEncoderImageProcessorKwargs, MultiEncoderSteps
from vitweave.processing.torchvision_steps import TorchvisionSteps


class MultiEncoderImageProcessor(MultiEncoderSteps, TorchvisionSteps):
    """Padded or tiled images to `pixel_values`, `num_tiles` and `image_sizes`.

    torchvision's bicubic is not Pillow's, which released weights were trained on: single pixels differ by up to 2 grey
    levels in photographs and up to 19 in noise. `MultiEncoderImageProcessorPil` has Pillow's.
    """

    resample = MultiEncoderSteps.resample
    valid_kwargs = MultiEncoderImageProcessorKwargs


__all__ = ["MultiEncoderImageProcessor", "MultiEncoderImageProcessorKwargs"]

"""The image steps of a processor with PIL and numpy."""

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling

from vitweave.processing.image_steps import channels_first, check_channels


class PilSteps(PilBackend):
    """An image to pixel values without torchvision."""

    resample = PILImageResampling.BILINEAR

    def process_image(self, image, do_convert_rgb=None, input_data_format=None, channels=None, **kwargs) -> np.ndarray:
        image = channels_first(image, do_convert_rgb, input_data_format, channels)
        check_channels(image, channels)
        return image

    def to_pixel_values(
        self, image: np.ndarray, do_rescale, rescale_factor, do_normalize, image_mean, image_std, **kwargs
    ) -> np.ndarray:
        image = self.rescale(image, rescale_factor) if do_rescale else image
        return self.normalize(image, image_mean, image_std) if do_normalize else image

    def pad_edges(
        self, image: np.ndarray, margins: tuple[int, int, int, int], colour: np.ndarray | None = None
    ) -> np.ndarray:
        """Zeros or a `colour` (channels, 1, 1) around the finished pixel values: top, bottom, left, right."""
        top, bottom, left, right = margins
        padded = np.pad(image, ((0, 0), (top, bottom), (left, right)))
        if colour is None:
            return padded
        outside = np.pad(np.zeros(image.shape[-2:], dtype=bool), ((top, bottom), (left, right)), constant_values=True)
        return np.where(outside, colour.astype(padded.dtype), padded)

"""The image steps of a processor with torchvision."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling
from transformers.utils import is_torchvision_available

from vitweave.processing.image_steps import channels_first, check_channels


class TorchvisionSteps(TorchvisionBackend):
    """An image to pixel values with torchvision; the class without it has the same name and `Pil` behind it."""

    resample = PILImageResampling.BILINEAR

    def __init__(self, **kwargs):
        if not is_torchvision_available():
            name = type(self).__name__
            raise ImportError(
                f"{name} needs torchvision, which is not installed; use {name}Pil or "
                "AutoImageProcessor.from_pretrained(..., backend='pil')"
            )
        super().__init__(**kwargs)

    def process_image(
        self, image, do_convert_rgb=None, input_data_format=None, device=None, channels=None, **kwargs
    ) -> Tensor:
        device = device or getattr(image, "device", None)
        image = torch.from_numpy(channels_first(image, do_convert_rgb, input_data_format, channels))
        check_channels(image, channels)
        return image.to(device)

    def to_pixel_values(
        self, image: Tensor, do_rescale, rescale_factor, do_normalize, image_mean, image_std, **kwargs
    ) -> Tensor:
        return self.rescale_and_normalize(image, do_rescale, rescale_factor, do_normalize, image_mean, image_std)

    def pad_edges(self, image: Tensor, margins: tuple[int, int, int, int], colour: Tensor | None = None) -> Tensor:
        """Zeros or a `colour` (channels, 1, 1) around the finished pixel values: top, bottom, left, right."""
        top, bottom, left, right = margins
        padded = F.pad(image, (left, right, top, bottom))
        if colour is None:
            return padded
        outside = F.pad(torch.zeros_like(image[:1], dtype=torch.bool), (left, right, top, bottom), value=True)
        return torch.where(outside, colour.to(padded), padded)

"""Aligned images of several sensors to tensors, with torchvision."""

import torch
from transformers.utils import is_torchvision_available

from vitweave.processing.modality_steps import ModalitySteps

if is_torchvision_available():
    from torchvision.transforms.v2 import functional as torchvision_functional


class ModalityImageProcessor(ModalitySteps):
    """Named modalities to `pixel_values` and `modality_mask`; see `ModalitySteps`.

    Pictures are resized by torchvision, within 1e-5 of the pixel values of `ModalityImageProcessorPil`, which needs
    none; measures, masks and class ids are the same.
    """

    backend = "torchvision"

    def __init__(self, *args, **kwargs):
        if not is_torchvision_available():
            raise ImportError(
                "ModalityImageProcessor needs torchvision, which is not installed; use ModalityImageProcessorPil or"
                " AutoImageProcessor.from_pretrained(..., backend='pil')"
            )
        super().__init__(*args, **kwargs)

    def resized_picture(self, picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return torchvision_functional.resize(picture, list(size), antialias=True)  # bilinear


__all__ = ["ModalityImageProcessor"]

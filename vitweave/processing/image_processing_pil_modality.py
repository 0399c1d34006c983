"""Aligned images of several sensors to tensors, without torchvision."""

import torch
import torch.nn.functional as F

from vitweave.processing.modality_steps import ModalitySteps


class ModalityImageProcessorPil(ModalitySteps):
    """Named modalities to `pixel_values` and `modality_mask`, without torchvision; see `ModalitySteps`."""

    backend = "pil"

    def resized_picture(self, picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return F.interpolate(picture[None], size=size, mode="bilinear", antialias=True)[0]


__all__ = ["ModalityImageProcessorPil"]

"""What enters a model of several modalities: images and which of them are there."""

import torch
from torch import Tensor

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig


def check_modalities(
    pixel_values: Tensor, modality_mask: Tensor | None, config: ModalityFusionConfig
) -> tuple[Tensor, Tensor | None]:
    """Refuse images that are not one per modality, a mask that does not fit, images without any sensor, and NaN.

    The values are looked at outside compiled graphs only.

    Args:
        pixel_values: (batch, modalities, channels, height, width), or with the images side by side (batch, modalities *
            channels, height, width), which heads of transformers can handle.
        modality_mask: (batch, modalities), 1 or True where the sensor is there; None where all are.

    Returns:
        The images (batch, modalities, channels, height, width) and the mask as booleans.
    """
    names = list(config.modalities)
    if pixel_values.ndim == 4 and pixel_values.shape[1] == len(names) * config.num_channels:
        pixel_values = pixel_values.unflatten(1, (len(names), config.num_channels))
    shape = tuple(pixel_values.shape)
    expected = f"pixel_values (batch, {len(names)} modalities {names}, {config.num_channels} channels, height, width)"
    if pixel_values.ndim == 4 and pixel_values.shape[1] not in (1, config.num_channels):
        raise ValueError(
            f"expected {expected}, got {shape}: images of {shape[1]} channels name no modalities; give every sensor an"
            " image of its own, as the modality image processor does"
        )
    if pixel_values.ndim != 5:
        raise ValueError(f"expected {expected}, got {shape}; stack the modalities' images on axis 1")
    if pixel_values.shape[1] != len(names):
        raise ValueError(
            f"expected {expected}, got {shape}; for an absent sensor give any image of that size and modality_mask with"
            " False in its place"
        )
    if pixel_values.shape[2] != config.num_channels:
        raise ValueError(f"expected {expected}, got {shape}; repeat the channel of sensors that have only one")
    if modality_mask is not None:
        if tuple(modality_mask.shape) != shape[:2]:
            raise ValueError(f"expected modality_mask {shape[:2]}, got {tuple(modality_mask.shape)}")
        modality_mask = modality_mask.bool()
    if not torch.compiler.is_compiling():
        check_values(pixel_values, modality_mask, names)
    return pixel_values, modality_mask


def check_values(pixel_values: Tensor, modality_mask: Tensor | None, names: list[str]) -> None:
    """Refuse images without any sensor, and NaN in one that is there."""
    if modality_mask is not None and not modality_mask.any(dim=1).all():
        rows = (~modality_mask.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"expected at least one present modality per image, got none in the images {rows[:10]}")
    broken = pixel_values.isnan().flatten(2).any(dim=2)  # (batch, modalities)
    if modality_mask is not None:
        broken = broken & modality_mask
    if broken.any():
        images = {name: broken[:, index].nonzero().flatten().tolist() for index, name in enumerate(names)}
        found = {name: rows[:10] for name, rows in images.items() if rows}
        raise ValueError(
            f"found NaN in pixel_values of {found} (modality: images); fill invalid pixels, or say with modality_mask"
            " that the sensor is absent"
        )

"""Aligned images of several sensors with the image of one that is to be drawn."""

from collections.abc import Sequence

import torch

from vitweave.processing.modality_steps import ModalitySteps
from vitweave.training.modality_data import ModalityDataset
from vitweave.training.modes import evaluating


def target_processor(name: str, sensor: dict, like: ModalitySteps) -> ModalitySteps:
    """Of the image that is to be drawn, with the geometry of the sensors': in [1, 2], and 0 where nothing was measured.

    Args:
        sensor: options of `Sensor`; its mean and std are not used.
    """
    return type(like)(
        {name: {**sensor, "mean": [-1.0] * 3, "std": [1.0] * 3}},
        size=like.size,
        size_divisor=like.size_divisor,
        measure_resample=like.measure_resample,
    )


def signed(shifted: torch.Tensor) -> torch.Tensor:
    """What `target_processor` gives, in [-1, 1]; NaN where nothing was measured."""
    return torch.where(shifted == 0, torch.nan, 2 * shifted - 3)


class TranslationDataset(ModalityDataset):
    """As `ModalityDataset`, with labels (3, height, width) in [-1, 1]; NaN where the target was not measured.

    Args:
        samples: items with "images" (modality -> image or None), as `ModalityFolder` has them with
            `label_folder=None`; or, of a `datasets.Dataset`, a column per modality. The target is one of them.
        processor: of the modalities that the model sees.
        target: the modality to be drawn.
        sensor: what its numbers mean, as the processor takes it: {"encoding": "metres", "value_range": [0, 10]}.
    """

    def __init__(
        self, samples: Sequence, processor, target: str, sensor: dict, augmentation=None, keep: Sequence | None = None
    ):
        super().__init__(samples, processor, augmentation, keep)
        self.target, self.target_processor = target, target_processor(target, sensor, processor)

    def encoded(self, images: dict, sample: dict) -> dict[str, torch.Tensor]:
        wanted = sample.get("images", sample).get(self.target)
        if wanted is None:
            raise ValueError(f"expected an image of {self.target!r} to be drawn, the sample has none")
        seen = {name: images[name] for name in self.processor.modalities if name in images}
        encoded = self.processor(seen)
        shifted = self.target_processor({self.target: wanted})["pixel_values"][0, 0]
        if shifted.shape[-2:] != encoded["pixel_values"].shape[-2:]:
            raise ValueError(
                f"expected a target of the sensors' size {tuple(encoded['pixel_values'].shape[-2:])}, got"
                f" {tuple(shifted.shape[-2:])}; set the processor's size"
            )
        return {key: encoded[key][0] for key in ("pixel_values", "modality_mask")} | {"labels": signed(shifted)}


def translate_modalities(model, processor, **images) -> torch.Tensor:
    """The image (3, height, width) in [0, 1] of one scene, e.g. `translate_modalities(model, processor, thermal=...)`.

    A measure is `low + image * (high - low)` with the `value_range` of the sensor it was trained on.

    Args:
        images: modality -> image, as the processor takes them; what is left out is absent.
    """
    inputs = processor(images).to(model.device, model.dtype)
    with evaluating(model):
        outputs = model(pixel_values=inputs["pixel_values"], modality_mask=inputs["modality_mask"])
    return (outputs.reconstruction[0].float() + 1) / 2

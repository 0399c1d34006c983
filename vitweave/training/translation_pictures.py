"""A PNG with one row per scene: what the sensors saw, the image drawn from it, and the real one."""

from pathlib import Path

import PIL.Image
import torch
from torch import Tensor

from vitweave.training.modes import evaluating
from vitweave.training.pictures import evenly_spread, picture_row, write_titled
from vitweave.training.translation_data import TranslationDataset, signed, target_processor


def painted(image: Tensor) -> PIL.Image.Image:
    """(3, height, width) in [-1, 1] as a picture; white where nothing was measured (NaN)."""
    values = ((image.float() + 1) / 2).clamp(0, 1).nan_to_num(1.0)
    return PIL.Image.fromarray((255 * values).round().byte().permute(1, 2, 0).cpu().numpy())


def write_translations(
    path: str | Path, model, dataset: TranslationDataset, count: int = 6, height: int = 144, gap: int = 4
) -> None:
    """Write rows of the sensors' images, the drawn and the real one, and a line that says which column is which.

    A measure is shown as the model sees it: black is the low end of its `value_range`, white the high end and what was
    not measured.

    Args:
        model: a `ModalityFusionForImageToImage`; it is in its former mode afterwards.
        dataset: without augmentation; `count` scenes are taken, spread evenly.
        height: of a row, in pixels.
    """
    steps = dataset.processor
    shown = {name: target_processor(name, sensor, steps) for name, sensor in steps.modalities.items()}
    rows = []
    for index in evenly_spread(len(dataset), count):
        item, sample = dataset[index], dataset.samples[index]
        with evaluating(model):
            pixel_values = item["pixel_values"][None].to(model.device, model.dtype)
            mask = item["modality_mask"][None].to(model.device)
            drawn = model(pixel_values, modality_mask=mask).reconstruction[0].cpu()
        images, seen = sample.get("images", sample), []
        for name, one in shown.items():
            present = images.get(name) is not None
            seen.append(signed(one({name: images[name]})["pixel_values"][0, 0]) if present else drawn * torch.nan)
        first, *others = [painted(image) for image in (*seen, drawn, item["labels"])]
        rows.append(picture_row(first, others, height, gap))
    columns = [*shown, f"{dataset.target}, drawn", f"{dataset.target}, real"]
    write_titled(path, rows, [(name, None) for name in columns], 14, gap)

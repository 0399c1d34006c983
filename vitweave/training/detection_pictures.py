"""A PNG with one row per image: the true boxes and those that a detector finds."""

from pathlib import Path

import PIL.Image
import torch
from PIL import ImageDraw
from transformers.image_transforms import center_to_corners_format

from vitweave.training.detection_data import DetectionDataset
from vitweave.training.modes import evaluating
from vitweave.training.pictures import class_colours, evenly_spread, picture_row, write_titled


def boxed(picture: PIL.Image.Image, boxes: torch.Tensor, labels: torch.Tensor, colours) -> PIL.Image.Image:
    """A picture with boxes (objects, 4) as left, top, right, bottom in its pixels, in the colour of their class."""
    picture = picture.convert("RGB")
    draw = ImageDraw.Draw(picture)
    for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
        colour = tuple(colours[label + 1].tolist())  # the first one is black
        draw.rectangle([round(edge) for edge in box], outline=colour)
    return picture


def write_detections(
    path: str | Path, model, dataset: DetectionDataset, count: int = 4, threshold: float = 0.3, height: int = 256
) -> None:
    """Write rows of the picture, its true boxes and the found ones, and a line that says which column is which.

    Args:
        model: a detector of transformers; it is in its former mode afterwards.
        dataset: without augmentation; `count` pictures are taken, spread evenly.
        threshold: of the score, from which on a box is drawn.
        height: of a row, in pixels.
    """
    colours, rows = class_colours(model.config.num_labels + 1), []
    for index in evenly_spread(len(dataset), count):
        item, picture = dataset[index], dataset.samples[index][dataset.image_column]
        picture = picture if isinstance(picture, PIL.Image.Image) else PIL.Image.fromarray(picture)
        true = center_to_corners_format(item["labels"]["boxes"]) * torch.tensor(picture.size * 2)
        with evaluating(model):
            outputs = model(pixel_values=item["pixel_values"][None].to(model.device, model.dtype))
        (found,) = dataset.processor.post_process_object_detection(
            outputs, threshold, [(picture.height, picture.width)]
        )
        columns = [boxed(picture, true, item["labels"]["class_labels"], colours)]
        columns.append(boxed(picture, found["boxes"].cpu(), found["labels"].cpu(), colours))
        rows.append(picture_row(picture, columns, height, 4))
    names = ["picture", "true", f"found, score from {threshold:g}"]
    write_titled(path, rows, [(name, None) for name in names], 14, 4)

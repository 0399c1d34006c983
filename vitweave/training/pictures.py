"""A PNG with one row per image: image, truth, prediction."""

import colorsys
from pathlib import Path

import numpy as np
import PIL.Image

IGNORED_COLOUR = (255, 255, 255)


def class_colours(num_labels: int) -> np.ndarray:
    """Colours that are easy to tell apart: black for class 0, then the golden angle around the hue circle.

    Returns:
        (num_labels, 3) uint8.
    """
    hues = [(0.6180339887 * index) % 1.0 for index in range(num_labels - 1)]
    colours = [(0.0, 0.0, 0.0)] + [colorsys.hsv_to_rgb(hue, 0.75, 0.95) for hue in hues]
    return np.round(np.array(colours[:num_labels]) * 255).astype(np.uint8)


def colour_classes(class_map, colours: np.ndarray) -> PIL.Image.Image:
    """Paint a class map (height, width); ids without a colour, such as the ignored one, become white."""
    class_map = np.asarray(class_map)
    known = (class_map >= 0) & (class_map < len(colours))
    table = np.concatenate([colours, np.array([IGNORED_COLOUR], dtype=np.uint8)])
    return PIL.Image.fromarray(table[np.where(known, class_map, len(colours))])


def write_prediction_rows(
    path: str | Path, images: list, truths: list, predictions: list, num_labels: int, height: int = 192, gap: int = 4
) -> None:
    """Write rows of image, truth and prediction.

    Args:
        images: PIL pictures.
        truths, predictions: class maps (height, width), arrays or tensors, of any size; they are resized to `height`
            pixels by nearest neighbour.
    """
    colours = class_colours(num_labels)
    rows = []
    for image, truth, prediction in zip(images, truths, predictions, strict=True):
        width = max(1, round(image.width * height / image.height))
        row = PIL.Image.new("RGB", (3 * width + 2 * gap, height), IGNORED_COLOUR)
        row.paste(image.convert("RGB").resize((width, height), PIL.Image.Resampling.BILINEAR), (0, 0))
        for column, class_map in ((1, truth), (2, prediction)):
            painted = colour_classes(class_map, colours).resize((width, height), PIL.Image.Resampling.NEAREST)
            row.paste(painted, (column * (width + gap), 0))
        rows.append(row)
    if not rows:
        raise ValueError("expected at least one image to show, got none")
    sheet = PIL.Image.new("RGB", (max(row.width for row in rows), len(rows) * (height + gap) - gap), IGNORED_COLOUR)
    for index, row in enumerate(rows):
        sheet.paste(row, (0, index * (height + gap)))
    sheet.save(path)

"""A contact sheet of pictures with their true and their predicted class."""

import math
from pathlib import Path

import PIL.Image
import torch
from PIL import ImageDraw, ImageFont

from vitweave.training.pictures import evenly_spread

RIGHT, WRONG, GROUND = (30, 130, 60), (200, 40, 40), (255, 255, 255)
LINE = 14  # pixels of one line of text


def shortened(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont, width: int) -> str:
    """The text, cut and ended with dots where it is wider than `width` pixels."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "..", font=font) > width:
        text = text[:-1]
    return text + ".."


@torch.no_grad()
def write_predictions(path: str | Path, model, dataset, count: int = 32) -> None:
    """Write a sheet of `count` images, spread evenly over the data set, with what the model says about them.

    Args:
        model: an image classifier of transformers or vitweave; it is put into eval mode.
        dataset: an `ImageClassificationDataset` without augmentation.
    """
    model.eval()
    rows = evenly_spread(len(dataset), count)
    names, pictures, truths, predictions, scores = model.config.id2label, [], [], [], []
    for index in rows:
        item = dataset[index]
        logits = model(pixel_values=item["pixel_values"][None].to(model.device)).logits[0]
        score, guess = logits.softmax(dim=0).max(dim=0)
        pictures.append(dataset.samples[index][dataset.image_column])
        truths.append(names[item["labels"]])
        predictions.append(names[int(guess)])
        scores.append(float(score))
    write_class_sheet(path, pictures, truths, predictions, scores)


def write_class_sheet(
    path: str | Path,
    images: list[PIL.Image.Image],
    truths: list[str],
    predictions: list[str],
    scores: list[float] | None = None,
    columns: int = 8,
    size: int = 112,
    gap: int = 6,
) -> None:
    """Write a PNG of tiles: the picture, its class, and below it the predicted one; the frame is
    green where it is right, else red.

    Args:
        images: PIL pictures; each is fitted into `size` x `size` pixels, nothing is cut off.
        scores: probability of the prediction, shown in percent.
    """
    if not images:
        raise ValueError("expected at least one image to show, got none")
    columns = min(columns, len(images))
    tall, rows = size + 2 * LINE + gap, math.ceil(len(images) / columns)
    sheet = PIL.Image.new("RGB", (columns * (size + gap) + gap, rows * tall + gap), GROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    scores = [None] * len(images) if scores is None else scores
    for index, (image, truth, prediction, score) in enumerate(zip(images, truths, predictions, scores, strict=True)):
        left, top = gap + index % columns * (size + gap), gap + index // columns * tall
        picture = image.convert("RGB")
        picture.thumbnail((size, size), PIL.Image.Resampling.BICUBIC)
        sheet.paste(picture, (left + (size - picture.width) // 2, top + (size - picture.height) // 2))
        colour = RIGHT if truth == prediction else WRONG
        draw.rectangle((left - 2, top - 2, left + size + 1, top + size + 1), outline=colour, width=2)
        guess = prediction if score is None else f"{prediction} {score:.0%}"
        draw.text((left, top + size), shortened(draw, truth, font, size), fill=(0, 0, 0), font=font)
        draw.text((left, top + size + LINE), shortened(draw, guess, font, size), fill=colour, font=font)
    sheet.save(path)

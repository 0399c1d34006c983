"""Pictures of where sentences point: each sentence's cosines with the tiles, laid over its figure."""

from pathlib import Path
from textwrap import wrap

import numpy as np
import PIL.Image
import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor, nn

from vitweave.processing.figure_steps import figure_box
from vitweave.processing.image_steps import picture_to_rgb
from vitweave.processing.sentences import split_sentences
from vitweave.training.pictures import even_colours, stack_rows

HEAT_COLOURS = even_colours(hues=(110.0, 20.0), chroma=0.22, lightness=(0.95, 0.45))
OPACITY = 0.65  # of the warmest spot; what a sentence does not point at stays as it is
TEXT_LINE = 15  # pixels


@torch.no_grad()
def sentence_heat_maps(
    model: nn.Module, processor, picture: PIL.Image.Image, caption: str | list[str]
) -> tuple[Tensor, Tensor]:
    """How well each sentence of a caption fits each place of a figure.

    Args:
        processor: a `FigureTextProcessor`.

    Returns:
        maps (sentences, height, width) of the figure's own size: the mean cosine of the tiles over each pixel;
        boxes (sentences, 4): top, left, bottom and right edge of the best of the smallest tiles, in its pixels.
    """
    device = next(model.parameters()).device
    encoded = processor(picture, [caption], truncation=True, return_tensors="pt").to(device)
    tiles, tile_mask = model.get_tile_features(encoded["pixel_values"], encoded["patch_mask"])
    sentences, mask = model.get_sentence_features(
        encoded["input_ids"], encoded["attention_mask"], sentence_ids=encoded["sentence_ids"]
    )
    cosines = (sentences[0][mask[0]] @ tiles[0].T).float().cpu()  # (sentences, tiles)
    size = tuple(encoded["pixel_values"].shape[-2:])
    edges = (model.alignment.tile_boxes().cpu() * torch.tensor([*size, *size])).round().long()
    top, left, height, width = figure_box((picture.height, picture.width), size, processor.image_processor.do_resize)
    total, count = torch.zeros(len(cosines), *size), torch.zeros(size)
    for number, (up, west, down, east) in enumerate(edges.tolist()):
        if tile_mask[0, number]:
            total[:, up:down, west:east] += cosines[:, number, None, None]
            count[up:down, west:east] += 1
    maps = (total / count.clamp(min=1))[:, top : top + height, left : left + width]
    maps = torch.nn.functional.interpolate(maps[None], size=(picture.height, picture.width), mode="bilinear")[0]
    areas = ((edges[:, 2] - edges[:, 0]) * (edges[:, 3] - edges[:, 1])).float()
    smallest = tile_mask[0].cpu() & (areas <= areas.min() * 1.5)
    best = edges[cosines.masked_fill(~smallest, -torch.inf).argmax(dim=1)].float() - torch.tensor(
        [top, left, top, left]
    )
    scale = torch.tensor([picture.height / height, picture.width / width]).repeat(2)
    limits = torch.tensor([picture.height, picture.width]).repeat(2)
    return maps, (best * scale).clamp(min=0).minimum(limits.float())


def overlay(picture: PIL.Image.Image, heat: Tensor, box: Tensor) -> PIL.Image.Image:
    """A figure under its heat (height, width) from 0 to 1, its best tile framed."""
    picture = picture_to_rgb(picture)
    colours = torch.from_numpy(HEAT_COLOURS)[(heat * 255).round().long()].float()
    pixels = torch.from_numpy(np.array(picture)).float()
    opacity = (OPACITY * heat)[..., None]
    mixed = (opacity * colours + (1 - opacity) * pixels).round().to(torch.uint8)
    picture = PIL.Image.fromarray(mixed.numpy())
    top, left, bottom, right = box.round().long().tolist()
    right, bottom = max(left + 1, right - 1), max(top + 1, bottom - 1)
    ImageDraw.Draw(picture).rectangle([left, top, right, bottom], outline=(20, 20, 20), width=2)
    return picture


def write_heat_maps(
    path: str | Path, model: nn.Module, processor, picture: PIL.Image.Image, caption: str | list[str], width: int = 360
) -> None:
    """A PNG with one row per sentence: the figure under the sentence's heat, and the sentence below it.

    Each sentence is clear where it fits least; full colour is the largest difference any of them makes, so that one
    which points nowhere stays pale.
    """
    was_training = model.training
    model.eval()
    try:
        maps, boxes = sentence_heat_maps(model, processor, picture, caption)
    finally:
        model.train(was_training)
    heat = maps - maps.amin(dim=(1, 2), keepdim=True)
    heat = heat / heat.max().clamp(min=1e-6)
    sentences = split_sentences(caption) if isinstance(caption, str) else list(caption)
    shown = [part for part in sentences if part.strip()][: len(maps)]
    size = (max(1, round(picture.height * width / picture.width)), width)
    shown_picture = picture_to_rgb(picture).resize((size[1], size[0]), PIL.Image.Resampling.BICUBIC)
    heat = torch.nn.functional.interpolate(heat[None], size=size, mode="bilinear")[0].clamp(0, 1)
    boxes = boxes * (width / picture.width)
    rows = []
    for sentence, one, box in zip(shown, heat, boxes, strict=True):
        rows += [overlay(shown_picture, one, box), text_block(sentence, width)]
    stack_rows(rows, 4).save(path)


def text_block(text: str, width: int) -> PIL.Image.Image:
    """A text in lines on white."""
    font = ImageFont.load_default(12)
    per_line = max(8, int(width / font.getlength("n")))
    lines = wrap(text, per_line) or [""]
    block = PIL.Image.new("RGB", (width, TEXT_LINE * len(lines) + 4), (255, 255, 255))
    for number, line in enumerate(lines):
        ImageDraw.Draw(block).text((2, number * TEXT_LINE), line, fill=(0, 0, 0), font=font)
    return block

"""The images a search found, on one PNG."""

from collections.abc import Sequence
from pathlib import Path

import PIL.Image
from PIL import ImageDraw, ImageFont

from vitweave.processing.figure_steps import figure_box
from vitweave.processing.image_steps import picture_to_rgb
from vitweave.training.heat_maps import text_block
from vitweave.training.image_index import Hit
from vitweave.training.paired_data import open_picture

GROUND, FRAME, MISSING = (255, 255, 255), (200, 200, 200), (120, 120, 120)
FOOTER = 22  # pixels below each picture


def sheet_tile(hit: Hit, place: int, size: int) -> PIL.Image.Image:
    """One picture, whole, above its rank, score and name; a file that is gone leaves a note."""
    tile = PIL.Image.new("RGB", (size, size + FOOTER), GROUND)
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(12)
    try:
        picture = picture_to_rgb(open_picture(Path(hit.record["path"])))
        top, left, height, width = figure_box((picture.height, picture.width), (size - 4, size - 4))
        tile.paste(picture.resize((width, height), PIL.Image.Resampling.BICUBIC), (left + 2, top + 2))
    except ValueError:
        draw.text((8, size // 2), "the file is not there", fill=MISSING, font=font)
    draw.rectangle([0, 0, size - 1, size - 1], outline=FRAME)
    text = f"{place}.  {hit.score:.3f}  {hit.record['name']}"
    while font.getlength(text) > size - 8 and len(text) > 8:
        text = text[:-2] + "\u2026" if not text.endswith("\u2026") else text[:-3] + "\u2026"
    draw.text((4, size + 3), text, fill=(0, 0, 0), font=font)
    return tile


def write_contact_sheet(path: str | Path, query: str, hits: Sequence[Hit], columns: int = 5, size: int = 220) -> None:
    """Write the hits row by row below the query, best first."""
    if not hits:
        raise ValueError("expected at least one hit to show, got none")
    columns, gap = min(columns, len(hits)), 8
    rows = -(-len(hits) // columns)
    head = text_block(query, columns * (size + gap) - gap)
    height = head.height + gap + rows * (size + FOOTER + gap)
    sheet = PIL.Image.new("RGB", (columns * (size + gap) + gap, height + gap), GROUND)
    sheet.paste(head, (gap, gap))
    for place, hit in enumerate(hits):
        row, column = divmod(place, columns)
        spot = (gap + column * (size + gap), head.height + 2 * gap + row * (size + FOOTER + gap))
        sheet.paste(sheet_tile(hit, place + 1, size), spot)
    sheet.save(path)

"""Small drawn figures with captions that tell what is on them: retrieval records without any file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from PIL import ImageDraw

COLOURS = {"red": (200, 40, 40), "green": (40, 150, 60), "blue": (40, 80, 200), "purple": (150, 60, 180)}
PLACES = ("left", "right")


def draw_bars(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour, rng: np.random.Generator) -> None:
    """Five bars of random height."""
    left, top, right, bottom = box
    step = (right - left) / 5
    for bar in range(5):
        height = rng.uniform(0.3, 1.0) * (bottom - top)
        draw.rectangle([left + bar * step, bottom - height, left + (bar + 0.7) * step, bottom], fill=colour)


def draw_curve(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour, rng: np.random.Generator) -> None:
    """One or two periods of a sine wave."""
    left, top, right, bottom = box
    across = np.linspace(0, 1, 24)
    down = 0.5 + 0.45 * np.sin(2 * np.pi * (across * rng.uniform(1, 2) + rng.uniform(0, 1)))
    points = [(left + x * (right - left), top + y * (bottom - top)) for x, y in zip(across, down, strict=True)]
    draw.line(points, fill=colour, width=max(1, (right - left) // 14))


def draw_dots(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour, rng: np.random.Generator) -> None:
    """Fourteen dots."""
    left, top, right, bottom = box
    radius = max(1, (right - left) // 14)
    for x, y in rng.uniform(0, 1, (14, 2)):
        x, y = left + radius + x * (right - left - 2 * radius), top + radius + y * (bottom - top - 2 * radius)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)


def draw_discs(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour, rng: np.random.Generator) -> None:
    """One disc."""
    left, top, right, bottom = box
    inner = int(rng.integers(4)) * (right - left) // 16
    draw.ellipse([left + inner, top + inner, right - inner, bottom - inner], fill=colour)


KINDS = {"bar chart": draw_bars, "curve": draw_curve, "scatter plot": draw_dots, "disc": draw_discs}


def write_figures(folder: str | Path, splits: Mapping[str, int], panel_size: int = 32) -> None:
    """A folder as `open_records` reads it: `captions.jsonl` and PNGs, so many records in each split."""
    folder, lines = Path(folder), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for seed, (split, length) in enumerate(splits.items()):
        figures = SyntheticFigures(length, panel_size, seed)
        for index in range(length):
            record = figures[index]
            place = f"images/{split}-{index}.png"
            record.pop("image").save(folder / place)
            lines.append(json.dumps({**record, "id": f"{split} {index}", "image": place, "split": split}))
    (folder / "captions.jsonl").write_text("\n".join(lines))


class SyntheticFigures(Sequence):
    """Wide figures with two panels; record `index` is always the same.

    Each panel is one of 16 pairs of kind and colour, and its sentence says so: "(a) A red bar chart on the left."
    """

    def __init__(self, length: int, panel_size: int = 32, seed: int = 0):
        self.length, self.panel_size, self.seed = length, panel_size, seed

    @property
    def column_names(self) -> list[str]:
        return ["id", "image", "caption", "sentences"]

    def __len__(self) -> int:
        return self.length

    def panels(self, index: int) -> list[tuple[str, str]]:
        """Kind and colour of the left and the right panel, which always differ."""
        rng = np.random.default_rng([self.seed, index])
        pairs = [(kind, colour) for kind in KINDS for colour in COLOURS]
        return [pairs[number] for number in rng.permutation(len(pairs))[: len(PLACES)]]

    def fields(self, index: int) -> dict:
        """The record without its picture."""
        if not 0 <= index < self.length:
            raise IndexError(f"record {index} of {self.length}")
        sentences = [
            f"({mark}) A {colour} {kind} on the {place}."
            for mark, place, (kind, colour) in zip("ab", PLACES, self.panels(index), strict=True)
        ]
        return {"id": f"figure {index}", "caption": " ".join(sentences), "sentences": sentences}

    def __getitem__(self, index: int) -> dict:
        record = self.fields(index)
        size = self.panel_size
        picture = PIL.Image.new("RGB", (len(PLACES) * size, size), (255, 255, 255))
        draw, margin = ImageDraw.Draw(picture), max(1, size // 8)
        for column, (kind, colour) in enumerate(self.panels(index)):
            left = column * size
            draw.line([(left + margin // 2, 0), (left + margin // 2, size - margin // 2)], fill=(0, 0, 0))
            draw.line([(left + margin // 2, size - margin // 2), (left + size, size - margin // 2)], fill=(0, 0, 0))
            box = (left + margin, margin, left + size - margin, size - margin)
            KINDS[kind](draw, box, COLOURS[colour], np.random.default_rng([self.seed, index, column]))
        return {**record, "image": picture}

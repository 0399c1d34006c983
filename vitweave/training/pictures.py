"""A PNG with one row per image: image, truth, prediction, and for depth the error."""

import colorsys
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from PIL import ImageDraw

IGNORED_COLOUR = (255, 255, 255)
MAX_ERROR = 0.5  # relative errors of depth from here on look alike


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
    for image, *class_maps in zip(images, truths, predictions, strict=True):
        rows.append(picture_row(image, [colour_classes(class_map, colours) for class_map in class_maps], height, gap))
    stack_rows(rows, gap).save(path)


def evenly_spread(length: int, count: int) -> list[int]:
    """`count` of the indices below `length`, or all of them where there are fewer."""
    count = min(count, length)
    return [place * length // count for place in range(count)]


def picture_row(image: PIL.Image.Image, painted: list[PIL.Image.Image], height: int, gap: int) -> PIL.Image.Image:
    """An image and painted maps of it side by side, `height` pixels high."""
    width = max(1, round(image.width * height / image.height))
    row = PIL.Image.new("RGB", ((len(painted) + 1) * (width + gap) - gap, height), IGNORED_COLOUR)
    row.paste(image.convert("RGB").resize((width, height), PIL.Image.Resampling.BILINEAR), (0, 0))
    for column, picture in enumerate(painted, start=1):
        row.paste(picture.resize((width, height), PIL.Image.Resampling.NEAREST), (column * (width + gap), 0))
    return row


def stack_rows(rows: list[PIL.Image.Image], gap: int) -> PIL.Image.Image:
    """Rows below each other on one white sheet."""
    if not rows:
        raise ValueError("expected at least one image to show, got none")
    size = (max(row.width for row in rows), sum(row.height + gap for row in rows) - gap)
    sheet, top = PIL.Image.new("RGB", size, IGNORED_COLOUR), 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + gap
    return sheet


def even_colours(hues: tuple[float, float], chroma: float, lightness: tuple[float, float]) -> np.ndarray:
    """256 colours whose perceived lightness changes evenly: a straight line in Oklch (Ottosson 2020), as sRGB.

    Args:
        hues: degrees at the first and the last colour; lightness: 0 (black) to 1 (white), likewise.
        chroma: colourfulness in the middle; it goes down to 0.3 of that at both ends, where sRGB has less of it.

    Returns:
        (256, 3) uint8.
    """
    steps = np.linspace(0, 1, 256)
    light = lightness[0] + steps * (lightness[1] - lightness[0])
    hue = np.radians(hues[0] + steps * (hues[1] - hues[0]))
    colourful = chroma * (0.3 + 0.7 * np.sin(np.pi * steps))
    a, b = colourful * np.cos(hue), colourful * np.sin(hue)
    cones = [
        light + 0.3963377774 * a + 0.2158037573 * b,
        light - 0.1055613458 * a - 0.0638541728 * b,
        light - 0.0894841775 * a - 1.2914855480 * b,
    ]
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = (to_rgb @ np.stack(cones) ** 3).clip(0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255 * curved.T).astype(np.uint8)


DEPTH_COLOURS = even_colours(hues=(100.0, -90.0), chroma=0.16, lightness=(0.95, 0.2))  # near is bright, far is dark
ERROR_COLOURS = even_colours(hues=(60.0, 20.0), chroma=0.16, lightness=(0.98, 0.35))  # no error is almost white


def colour_depth(values, measured, limits: tuple[float, float], colours: np.ndarray = DEPTH_COLOURS) -> PIL.Image.Image:
    """Paint (height, width) values from the first to the last colour; what was not measured is striped grey."""
    values, measured = np.asarray(values, dtype=np.float64), np.asarray(measured)
    share = (np.nan_to_num(values) - limits[0]) / max(limits[1] - limits[0], 1e-9)
    painted = colours[np.round(255 * share.clip(0, 1)).astype(np.int64)]
    rows, columns = np.indices(values.shape)
    stripes = np.where(((rows + columns) // 4 % 2)[..., None], 110, 165).astype(np.uint8)
    return PIL.Image.fromarray(np.where(measured[..., None], painted, stripes).astype(np.uint8))


def legend(width: int, columns: list[tuple[str, np.ndarray | None]], height: int, gap: int) -> PIL.Image.Image:
    """A line below the rows: what each column shows, over the bar of its colours."""
    line = PIL.Image.new("RGB", (len(columns) * (width + gap) - gap, height), IGNORED_COLOUR)
    draw = ImageDraw.Draw(line)
    for index, (text, colours) in enumerate(columns):
        left = index * (width + gap)
        draw.text((left + 2, 0), text, fill=(0, 0, 0))
        if colours is not None:
            bar = PIL.Image.fromarray(colours[None]).resize((width, height - 14), PIL.Image.Resampling.BILINEAR)
            line.paste(bar, (left, 14))
    return line


def write_titled(
    path: str | Path, rows: list[PIL.Image.Image], columns: list[tuple[str, np.ndarray | None]], height: int, gap: int
) -> None:
    """Write rows of columns of one width, with a `legend` of that height below them."""
    sheet = stack_rows(rows, gap)
    width = (rows[0].width + gap) // len(columns) - gap
    stack_rows([sheet, legend(width, columns, height, gap)], gap).save(path)


def write_depth_rows(
    path: str | Path, images: list, truths: list, predictions: list, height: int = 192, gap: int = 4
) -> None:
    """Write rows of image, measured depth, predicted depth and relative error |p - t| / t, and a legend.

    One scale for all rows: depth from the nearest to the farthest measurement, errors from 0 to 0.5, beyond which they
    look alike. Pixels without a measurement are striped grey, in the error too.

    Args:
        images: PIL pictures.
        truths, predictions: metres (height, width), arrays or tensors; a truth of 0 or less holds no measurement. A
            prediction of another size is resized bilinearly to its truth.
    """
    truths = [np.asarray(torch.as_tensor(truth).float().cpu()) for truth in truths]
    measured = [np.isfinite(truth) & (truth > 0) for truth in truths]
    known = [truth[mask] for truth, mask in zip(truths, measured, strict=True) if mask.any()]
    limits = (min(map(np.min, known)), max(map(np.max, known))) if known else (0.0, 1.0)
    rows = []
    for image, truth, mask, prediction in zip(images, truths, measured, predictions, strict=True):
        prediction = torch.as_tensor(prediction).detach().float().cpu()[None, None]
        prediction = torch.nn.functional.interpolate(prediction, size=truth.shape, mode="bilinear")[0, 0].numpy()
        error = np.abs(prediction - truth) / np.where(mask, truth, 1)
        painted = [
            colour_depth(truth, mask, limits),
            colour_depth(prediction, np.isfinite(prediction), limits),
            colour_depth(error, mask, (0, MAX_ERROR), ERROR_COLOURS),
        ]
        rows.append(picture_row(image, painted, height, gap))
    depth = f"{limits[0]:.2f} to {limits[1]:.2f} m"
    columns = [("image", None), (f"measured, {depth}", DEPTH_COLOURS), (f"predicted, {depth}", DEPTH_COLOURS)]
    columns.append((f"relative error, 0 to {MAX_ERROR}", ERROR_COLOURS))
    write_titled(path, rows, columns, 26, gap)

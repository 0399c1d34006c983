"""Heat maps lie where the sentence points, in the figure's own pixels."""

import numpy as np
import PIL.Image
import torch
from tiny_retriever import NAMES, ColourReader, tiny_processor

from vitweave.training.heat_maps import overlay, sentence_heat_maps, write_heat_maps


def two_halves(width, height):
    picture = PIL.Image.new("RGB", (width, height), NAMES["red"])
    picture.paste(NAMES["blue"], (width // 2, 0, width, height))
    return picture


def test_the_warm_half_is_the_one_that_is_named(tmp_path):
    processor = tiny_processor(list(NAMES) * 9)
    model = ColourReader(processor.tokenizer)
    for size in ((120, 40), (40, 120), (64, 64)):
        picture = two_halves(*size)
        maps, boxes = sentence_heat_maps(model, processor, picture, ["red", "blue"])
        assert maps.shape == (2, size[1], size[0])
        middle = size[0] // 2
        assert maps[0, :, :middle].mean() > maps[0, :, middle:].mean() + 0.3
        assert maps[1, :, :middle].mean() < maps[1, :, middle:].mean() - 0.3
        assert boxes[0, 3] <= middle + 1 and boxes[1, 1] >= middle - 1
        assert (boxes >= 0).all() and (boxes[:, 2] <= size[1]).all() and (boxes[:, 3] <= size[0]).all()
    write_heat_maps(tmp_path / "heat.png", model.train(), processor, two_halves(120, 40), ["red", "blue"], width=240)
    with PIL.Image.open(tmp_path / "heat.png") as sheet:
        assert sheet.width == 240 and sheet.height > 2 * 80 and model.training


def test_cold_places_stay_as_they_are():
    picture = two_halves(20, 10)
    heat = torch.zeros(10, 20)
    heat[:, :5] = 1
    pixels = np.asarray(overlay(picture, heat, torch.tensor([0.0, 0.0, 10.0, 5.0])))
    np.testing.assert_array_equal(pixels[:, 6:], np.asarray(picture)[:, 6:])
    assert not np.array_equal(pixels[3:7, 2:3], np.asarray(picture)[3:7, 2:3]) and pixels[0, 0].max() == 20

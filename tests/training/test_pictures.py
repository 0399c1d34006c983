"""The rows of image, truth and prediction."""

import numpy as np
import PIL.Image
import pytest
import torch

from vitweave.training.pictures import (
    DEPTH_COLOURS,
    ERROR_COLOURS,
    class_colours,
    write_depth_rows,
    write_prediction_rows,
)
from vitweave.training.synthetic_shapes import SyntheticShapes


def test_colours_differ_and_class_0_is_black():
    colours = class_colours(40)
    assert len({tuple(colour) for colour in colours.tolist()}) == 40 and colours[0].tolist() == [0, 0, 0]


def test_rows_show_image_truth_and_prediction(tmp_path):
    samples = list(SyntheticShapes(2))
    truths = [np.array(sample["label"]) for sample in samples]
    predictions = [torch.full((8, 8), 255), torch.ones(8, 8, dtype=torch.long)]  # ignored pixels are white
    images = [sample["image"] for sample in samples]
    write_prediction_rows(tmp_path / "rows.png", images, truths, predictions, num_labels=3, height=32, gap=2)
    sheet = np.array(PIL.Image.open(tmp_path / "rows.png"))
    assert sheet.shape == (32 * 2 + 2, 32 * 3 + 2 * 2, 3)
    np.testing.assert_array_equal(sheet[:32, :32], np.array(images[0]))
    np.testing.assert_array_equal(sheet[:32, 34:66], class_colours(3)[truths[0]])
    assert (sheet[:32, 68:] == 255).all() and (sheet[34:, 68:] == class_colours(3)[1]).all()
    with pytest.raises(ValueError, match="at least one"):
        write_prediction_rows(tmp_path / "none.png", [], [], [], num_labels=3)


@pytest.mark.parametrize("colours", [DEPTH_COLOURS, ERROR_COLOURS])
def test_colour_maps_grow_evenly_darker(colours):
    linear = np.where(colours / 255 <= 0.04045, colours / 255 / 12.92, ((colours / 255 + 0.055) / 1.055) ** 2.4)
    lightness = np.cbrt(linear @ [0.2126, 0.7152, 0.0722])  # CIE L* up to a constant
    assert colours.shape == (256, 3) and len(np.unique(colours, axis=0)) > 200
    steps = -np.diff(lightness[::16])
    assert (steps > 0).all() and steps.max() < 3 * steps.min()


def test_depth_rows_share_a_scale_and_mark_what_was_not_measured(tmp_path):
    images = [PIL.Image.new("RGB", (40, 32), (9, 9, 9))] * 2
    truths = [np.full((32, 40), 2.0), torch.full((32, 40), 6.0)]
    truths[0][:8] = 0
    predictions = [torch.full((8, 10), 2.0), np.full((32, 40), 100.0)]
    write_depth_rows(tmp_path / "rows.png", images, truths, predictions, height=32, gap=2)
    sheet = np.array(PIL.Image.open(tmp_path / "rows.png"))
    assert sheet.shape[1] == 4 * 40 + 3 * 2 and sheet.shape[0] > 32 * 2 + 2
    truth, prediction, error = (sheet[:66, left : left + 40] for left in (42, 84, 126))
    striped = truth[:8]
    assert (striped[..., 0] == striped[..., 2]).all() and set(np.unique(striped)) == {110, 165}
    assert (truth[8:32] == DEPTH_COLOURS[0]).all() and (truth[34:] == DEPTH_COLOURS[255]).all()
    assert (prediction[:32] == DEPTH_COLOURS[0]).all() and (prediction[34:] == DEPTH_COLOURS[255]).all()  # beyond
    assert (error[:8] == striped).all() and (error[8:32] == ERROR_COLOURS[0]).all()
    assert (error[34:] == ERROR_COLOURS[255]).all()


def test_depth_rows_without_any_measurement(tmp_path):
    image = PIL.Image.new("RGB", (20, 16))
    write_depth_rows(tmp_path / "rows.png", [image], [np.full((16, 20), np.nan)], [torch.full((16, 20), torch.nan)])
    assert (tmp_path / "rows.png").exists()
    with pytest.raises(ValueError, match="at least one"):
        write_depth_rows(tmp_path / "none.png", [], [], [])

"""The rows of image, truth and prediction."""

import numpy as np
import PIL.Image
import pytest
import torch

from vitweave.training.pictures import class_colours, write_prediction_rows
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

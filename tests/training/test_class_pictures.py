"""The contact sheet of predictions."""

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import ViTImageProcessorPil

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_specialized_vit import SpecializedViTForImageClassification
from vitweave.training.class_pictures import RIGHT, WRONG, write_class_sheet, write_predictions
from vitweave.training.classification_data import ImageClassificationDataset
from vitweave.training.synthetic_classes import SyntheticClasses


def colours(path):
    return {tuple(colour) for colour in np.asarray(PIL.Image.open(path)).reshape(-1, 3).tolist()}


def test_right_and_wrong_tiles_have_their_colours(tmp_path):
    pictures = [PIL.Image.new("RGB", (30, 60), (9, 9, 200))] * 3
    write_class_sheet(tmp_path / "a.png", pictures, ["cat"] * 3, ["cat"] * 3, columns=2, size=40, gap=4)
    assert PIL.Image.open(tmp_path / "a.png").size == (2 * 44 + 4, 2 * (40 + 28 + 4) + 4)
    assert RIGHT in colours(tmp_path / "a.png") and WRONG not in colours(tmp_path / "a.png")
    write_class_sheet(tmp_path / "b.png", pictures, ["cat"] * 3, ["a very long name of a dog"] * 3, [0.5] * 3)
    assert WRONG in colours(tmp_path / "b.png") and RIGHT not in colours(tmp_path / "b.png")
    tile = np.asarray(PIL.Image.open(tmp_path / "a.png"))[4:44, 4:44]
    assert (tile == (9, 9, 200)).all(axis=-1).sum() == 20 * 40  # whole, nothing cut off
    with pytest.raises(ValueError, match="at least one image"):
        write_class_sheet(tmp_path / "c.png", [], [], [])


def test_a_model_is_shown_on_images_of_all_parts(tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    model = SpecializedViTForImageClassification(SpecializedViTConfig(**small, id2label=SyntheticClasses.id2label))
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 100.0, 0.0]))  # always says "square"
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    dataset = ImageClassificationDataset(SyntheticClasses(9), processor)
    write_predictions(tmp_path / "a.png", model, dataset, count=3)  # images 0, 3, 6: all discs
    assert WRONG in colours(tmp_path / "a.png") and RIGHT not in colours(tmp_path / "a.png")
    write_predictions(tmp_path / "b.png", model, dataset)
    assert {WRONG, RIGHT} <= colours(tmp_path / "b.png")

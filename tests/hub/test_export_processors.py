"""A processor of images and texts leaves with its code, and is found again."""

import json

import PIL.Image
import pytest
import torch
from tiny_retriever import tiny_processor
from transformers import CLIPImageProcessorPil, ProcessorMixin

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.hub.export import export, load_processor
from vitweave.hub.families import find_joint_processor_class, joint_processor_references
from vitweave.modeling.modeling_specialized_vit import SpecializedViTModel
from vitweave.processing.processing_figure_text import FigureTextProcessor


def tiny_model():
    torch.manual_seed(0)
    config = SpecializedViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    return SpecializedViTModel(config)


def test_both_parts_leave_with_their_code(tmp_path):
    processor = tiny_processor(["A wave."])
    folder = export(tiny_model(), tmp_path / "out", processor, verify=False)
    joint, image = (json.loads((folder / f"{name}_config.json").read_text()) for name in ("processor", "preprocessor"))
    assert joint["auto_map"] == {"AutoProcessor": "processing_figure_text.FigureTextProcessor"}
    assert image["auto_map"]["AutoImageProcessor"]["pil"] == "image_processing_pil_figure.FigureImageProcessorPil"
    assert {"figure_steps.py", "sentences.py", "tokenizer.json"} < {file.name for file in folder.iterdir()}
    loaded = load_processor(folder)
    assert type(loaded) is FigureTextProcessor
    first, second = (one(PIL.Image.new("RGB", (9, 5)), "A wave.", return_tensors="pt") for one in (processor, loaded))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_the_folder_opens_without_the_package(tmp_path):
    export(tiny_model(), tmp_path / "out", tiny_processor(["A wave."]))  # loads the processor too


def test_foreign_processors():
    assert find_joint_processor_class("CLIPProcessor").__module__.startswith("transformers.")

    class Mine(ProcessorMixin):
        def __init__(self, image_processor=None):
            super().__init__(image_processor)

    with pytest.raises(ValueError, match="whose code would be missing"):
        joint_processor_references(Mine(CLIPImageProcessorPil()))
    with pytest.raises(ValueError, match="expected a processor of transformers"):
        find_joint_processor_class("Unheard")

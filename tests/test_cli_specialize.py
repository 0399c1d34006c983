"""`vitweave specialize` from the command line."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification, SiglipVisionConfig, SiglipVisionModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from vanilla_hosts import BACKBONE_HOSTS, CLASSIFIER_HOSTS, randomized

from vitweave.cli import main
from vitweave.modeling.modeling_specialized_vit import SpecializedViTBackbone


def test_a_classifier_with_its_processor(tmp_path: Path, capsys):
    host = randomized(CLASSIFIER_HOSTS["vit"](), torch.float32)
    host.save_pretrained(tmp_path / "vanilla")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vanilla")
    out = tmp_path / "out"
    flags = ["--norm-blocks", "all", "--qkv-blocks", "2", "--mlp-blocks", "0,2", "--cls-rank", "4", "--final-norm"]
    assert main(["specialize", str(tmp_path / "vanilla"), str(out), *flags]) == 0
    printed = capsys.readouterr().out
    assert "ViTForImageClassification -> SpecializedViTForImageClassification" in printed
    assert "cloned to CLS" in printed
    model = AutoModelForImageClassification.from_pretrained(out)
    assert model.config.qkv_blocks == [0, 1]
    assert model.config.mlp_blocks == [0, 2]
    assert model.config.specialize_final_norm
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, host(pixels).logits, atol=1e-5, rtol=0)
    assert json.loads((out / "preprocessor_config.json").read_text())["size"]["height"] == 32


def test_a_backbone_without_processor(tmp_path: Path, capsys):
    BACKBONE_HOSTS["dinov2"]().save_pretrained(tmp_path / "vanilla")
    assert main(["specialize", str(tmp_path / "vanilla"), str(tmp_path / "out"), "--out-indices", "2"]) == 0
    assert "no image processor" in capsys.readouterr().out
    assert SpecializedViTBackbone.from_pretrained(tmp_path / "out").out_indices == [2]


def test_errors_are_one_line_and_leave_nothing(tmp_path: Path, capsys):
    config = SiglipVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    SiglipVisionModel(config).save_pretrained(tmp_path / "siglip")
    assert main(["specialize", str(tmp_path / "siglip"), str(tmp_path / "out")]) == 2
    assert "no class token" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["specialize", str(tmp_path / "siglip"), str(tmp_path / "siglip")]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["specialize", "a", "b", "--qkv-blocks", "most"])
    assert "'most' is not all" in capsys.readouterr().err

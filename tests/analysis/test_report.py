import argparse
import json
import sys

import pytest
import torch
from PIL import Image
from transformers import (
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from vitweave.analysis.command import add_inspect_command
from vitweave.analysis.report import InspectOptions, inspect_model
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.modeling_specialized_vit import SpecializedViTBackbone, SpecializedViTModel

NUMBERS = InspectOptions(plots=False)
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4)
KEYS = [
    "model model_type images preprocessing image_size vitweave_version grid num_cls_tokens num_register_tokens",
    "token_similarity dimensions patch_norms pca drift skipped plots",
]


def picture(seed, width, height):
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture
def photos(tmp_path):
    """A folder with two pictures of different size and a file that is none."""
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    picture(0, 20, 30).save(folder / "b.png")
    picture(1, 33, 21).convert("L").save(folder / "deeper" / "a.JPG")
    (folder / "notes.txt").write_text("no picture")
    return folder


def vit_folder(tmp_path, processor=True):
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**TINY, intermediate_size=32)).save_pretrained(tmp_path / "vit")
    if processor:
        ViTImageProcessor(size={"height": 16, "width": 24}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def command(*args):
    parser = argparse.ArgumentParser()
    add_inspect_command(parser.add_subparsers(required=True))
    parsed = parser.parse_args(["inspect", *map(str, args)])
    return parsed.run(parsed)


def no_constants(name):
    raise AssertionError(f"{name} is no JSON")


def test_command_on_a_vanilla_classifier(tmp_path, photos, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert command(vit_folder(tmp_path), photos, "--out", out) == 0
    report = json.loads((out / "report.json").read_text(), parse_constant=no_constants)
    assert list(report) == " ".join(KEYS).split()
    assert [name.rsplit("/")[-1] for name in report["images"]] == ["b.png", "a.JPG"]
    assert report["preprocessing"].startswith("ViTImageProcessor") and report["image_size"] == [16, 24]
    assert report["grid"] == [4, 6] and report["num_cls_tokens"] == 1
    similarity = report["token_similarity"]["after.norm1"]["cls_patch_cosine"]
    assert len(similarity["mean"]) == 2 and len(similarity["per_image"][0]) == 2
    assert len(report["dimensions"]["before.norm2"]["share"][1]) == 16
    assert report["plots"] == ["cosine.png", "dimensions.png", "patch_norms.png", "pca.png"]
    assert set(report["plots"]) | {"report.json"} == {path.name for path in out.iterdir()}
    assert set(report["skipped"]) == {"cls_register_cosine", "drift"} and report["drift"] is None
    assert "[CLS] / patch cosine" in capsys.readouterr().out


def test_a_specialised_model_with_drift(tmp_path, photos):
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    model = SpecializedViTModel(SpecializedViTConfig(**TINY, num_register_tokens=2, qkv_blocks="all"))
    with torch.no_grad():
        model.encoder.layer[0].norm1_cls.bias.add_(1)  # the patch bias is 0: no finite ratio
    model.save_pretrained(tmp_path / "specialised")
    report = inspect_model(tmp_path / "specialised", photos, tmp_path / "out")
    assert "drift.png" in report["plots"] and report["skipped"] == {}
    assert report["preprocessing"].startswith("default") and report["image_size"] == [16, 16]
    drift = {entry["name"]: entry for entry in report["drift"]}
    assert drift["encoder.layer.0.norm1.bias"] == {
        "name": "encoder.layer.0.norm1.bias",
        "block": 0,
        "absolute": pytest.approx(4),
        "relative": None,
    }
    assert "cls_register_cosine" in report["token_similarity"]["before.norm1"]


def test_without_matplotlib_the_numbers_are_written(tmp_path, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report = inspect_model(Dinov2Model(Dinov2Config(**TINY)), photos, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]
    assert report["plots"] == [] and "pip install vitweave[viz]" in report["skipped"]["plots"]


def test_a_model_without_class_token_is_measured_where_it_can_be(tmp_path, photos):
    model = SiglipVisionModel(SiglipVisionConfig(**TINY, intermediate_size=32))
    report = inspect_model(model, photos, tmp_path / "out", options=NUMBERS)
    assert report["skipped"]["cls_patch_cosine"] == "SiglipVisionModel has no class token"
    assert report["dimensions"] is None and report["pca"] is not None
    assert list(report["token_similarity"]["after.norm1"]) == ["patch_patch_cosine"]


def test_the_backbone_of_a_segmentation_model(tmp_path, photos):
    backbone = Dinov2Config(**TINY, out_features=["stage1", "stage2"])
    model = UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=backbone, hidden_size=8, use_auxiliary_head=False, pool_scales=[1])
    )
    model.save_pretrained(tmp_path / "upernet")
    report = inspect_model(tmp_path / "upernet", photos, tmp_path / "out", options=NUMBERS)
    assert report["model_type"] == "dinov2" and report["pca"] is not None


def test_a_trained_dense_predictor_is_measured_through_its_backbone(tmp_path, photos):
    backbone = SpecializedViTBackbone(SpecializedViTConfig(**TINY, out_indices=[1]))
    DensePredictorForSemanticSegmentation.from_backbone(backbone, num_labels=3).save_pretrained(tmp_path / "model")
    report = inspect_model(tmp_path / "model", photos, tmp_path / "out", options=NUMBERS)
    assert report["model_type"] == "specialized_vit" and report["drift"] is not None
    assert len(report["token_similarity"]["after.norm1"]["cls_patch_cosine"]["mean"]) == 1  # block 1 is not run


def test_options_reach_the_report(tmp_path, photos):
    options = InspectOptions(plots=False, limit=1, tau=0.6, norm_threshold=0.0, norm_block=0, foreground_threshold=0.5)
    report = inspect_model(Dinov2Model(Dinov2Config(**TINY)), photos, tmp_path / "out", options=options)
    assert len(report["images"]) == 1 and report["dimensions"]["tau"] == 0.6
    assert report["patch_norms"]["block"] == 0 and report["patch_norms"]["fraction_above"] == 1.0
    assert 0 < report["pca"]["foreground_fraction"] < 1


def test_opened_pictures_and_a_processor_of_choice(tmp_path):
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, do_normalize=False)
    pictures = [picture(seed, 9, 9) for seed in range(3)]
    report = inspect_model(
        Dinov2Model(Dinov2Config(**TINY)), pictures, tmp_path / "out", processor=processor, options=NUMBERS
    )
    assert report["images"] == ["picture 0", "picture 1", "picture 2"] and report["grid"] == [2, 2]


def test_refusals(tmp_path, photos):
    model, out = Dinov2Model(Dinov2Config(**TINY)), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*empty.*\.png"):
        inspect_model(model, tmp_path / "empty", out)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        inspect_model(model, tmp_path / "nowhere", out)
    with pytest.raises(ValueError, match="no images"):
        inspect_model(model, [], out)
    (photos / "broken.png").write_bytes(b"not a png")
    with pytest.raises(ValueError, match=r"cannot read .*broken.png"):
        inspect_model(model, photos, out)
    shortest_edge = ViTImageProcessor(do_resize=False)
    with pytest.raises(ValueError, match="let it resize and crop to one size"):
        inspect_model(model, [picture(0, 16, 16), picture(0, 16, 24)], out, processor=shortest_edge)
    assert not out.exists()


def test_incomplete_checkpoints_are_refused(tmp_path, photos):
    from safetensors.torch import load_file, save_file

    folder = vit_folder(tmp_path)
    state = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in state.items() if "layernorm_before" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 4 weights of ViTModel"):
        inspect_model(folder, photos, tmp_path / "out")

"""A model leaves with its code: into a folder that loads without vitweave, or not at all."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from modality_translators import tiny_generator
from retrieval_models import retriever
from safetensors.torch import load_file, save_file
from tiny_vlm import CONVNEXT, tiny_tower, tiny_vlm_config, tiny_vlm_processor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    DPTImageProcessorPil,
)

from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.hub import export as export_module
from vitweave.hub import verify_bundle
from vitweave.hub.card import CardInfo
from vitweave.hub.export import export, load_card, load_model, load_processor, push_to_hub_with_code, random_image
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.modeling_depth import DensePredictorForDepthEstimation
from vitweave.modeling.modeling_modality_fusion import ModalityFusionForSemanticSegmentation
from vitweave.modeling.modeling_modality_translation import ModalityAdversarialTranslator
from vitweave.modeling.modeling_multi_encoder import MultiEncoderModel
from vitweave.modeling.modeling_multi_encoder_vlm import MultiEncoderVlmForConditionalGeneration
from vitweave.modeling.modeling_specialized_vit import SpecializedViTForImageClassification, SpecializedViTModel
from vitweave.processing.image_processing_pil_depth import DepthImageProcessorPil
from vitweave.processing.image_processing_pil_modality import ModalityImageProcessorPil
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "num_labels": 3}
PROCESSOR = BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


def classifier(**options):
    torch.manual_seed(0)
    return SpecializedViTForImageClassification(SpecializedViTConfig(**(TINY | options))).eval()


def segmenter():
    """A composite with one of our own models inside."""
    torch.manual_seed(0)
    backbone = SpecializedViTConfig(**TINY, num_register_tokens=2, qkv_blocks=2, out_indices=[1, 3])
    return DensePredictorForSemanticSegmentation(DensePredictorConfig(backbone_config=backbone, num_labels=3)).eval()


@pytest.fixture
def saved(tmp_path):
    """A model saved the ordinary way, to be loaded or damaged."""
    folder = tmp_path / "saved"
    classifier().save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what is written -------------------------------------------------------------------------------------------------


def test_the_folder_holds_weights_config_processor_code_and_card(tmp_path):
    folder = export(classifier(), tmp_path / "out", PROCESSOR, verify=False)
    files = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"} < files
    assert {"modeling_specialized_vit.py", "configuration_specialized_vit.py", "pretrained.py"} < files
    assert not [name for name in files if name.endswith(".py") and "vitweave" in name]
    assert sorted(os.listdir(tmp_path)) == ["out"]  # nothing temporary stays


def test_every_auto_class_of_the_family_is_in_the_auto_map_and_names_a_file(tmp_path):
    folder = export(classifier(), tmp_path / "out", verify=False)
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_specialized_vit.SpecializedViTConfig",
        "AutoModel": "modeling_specialized_vit.SpecializedViTModel",
        "AutoBackbone": "modeling_specialized_vit.SpecializedViTBackbone",
        "AutoModelForImageClassification": "modeling_specialized_vit.SpecializedViTForImageClassification",
    }


def test_a_composite_brings_its_parts_and_both_image_processors(tmp_path):
    folder = export(segmenter(), tmp_path / "out", SegmentationImageProcessorPil(), verify=False)
    files = {path.name for path in folder.iterdir()}
    assert {"modeling_dense_predictor.py", "own_models.py", "modeling_specialized_vit.py", "heads_linear.py"} < files
    auto_map = json.loads((folder / "preprocessor_config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoImageProcessor": {
            "torchvision": "image_processing_segmentation.SegmentationImageProcessor",
            "pil": "image_processing_pil_segmentation.SegmentationImageProcessorPil",
        }
    }
    assert {f"{reference.partition('.')[0]}.py" for reference in auto_map["AutoImageProcessor"].values()} < files
    assert type(load_processor(folder)).__name__.startswith("SegmentationImageProcessor")


@pytest.mark.slow
def test_the_processor_of_the_second_task_travels_too(tmp_path):
    """Both backends load from the folder's own code in the clean process that checks it; here the own class does."""
    folder = export(segmenter(), tmp_path / "out", DepthImageProcessorPil(size=28, depth_scale=0.001))
    auto_map = json.loads((folder / "preprocessor_config.json").read_text())["auto_map"]["AutoImageProcessor"]
    assert auto_map == {
        "torchvision": "image_processing_depth.DepthImageProcessor",
        "pil": "image_processing_pil_depth.DepthImageProcessorPil",
    }
    assert (folder / "depth_steps.py").exists() and not (folder / "segmentation_steps.py").exists()
    assert type(load_processor(folder)).__name__.startswith("DepthImageProcessor")
    assert load_processor(folder).depth_scale == 0.001


def test_a_foreign_auto_map_is_replaced(tmp_path):
    model = classifier()
    model.config.auto_map = {"AutoModel": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    folder = export(model, tmp_path / "out", verify=False)
    assert "evil" not in (folder / "config.json").read_text()
    assert model.config.auto_map["AutoModel"] == "evil.Evil"  # the caller's model is left as it was


def test_an_auto_map_of_a_part_is_dropped(tmp_path):
    model = segmenter()
    model.config.backbone_config.auto_map = {"AutoModel": "evil.Evil"}
    folder = export(model, tmp_path / "out", verify=False)
    assert "evil" not in (folder / "config.json").read_text()


def test_with_vitweave_installed_the_own_class_opens_the_folder(tmp_path):
    model = classifier()
    folder = export(model, tmp_path / "out", PROCESSOR, verify=False)
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert type(loaded) is SpecializedViTForImageClassification
    pixels = random_image(model.config)
    torch.testing.assert_close(loaded(**pixels).logits, model(**pixels).logits)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.torchvision
def test_the_processor_opens_by_its_auto_class(tmp_path):
    pytest.importorskip("torchvision", reason="needs torchvision")
    folder = export(classifier(), tmp_path / "out", PROCESSOR, verify=False)
    assert isinstance(AutoImageProcessor.from_pretrained(folder, backend="pil"), BitImageProcessorPil)


def test_modes_of_the_model_are_restored_after_the_check(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "check_bundle", lambda *args: None)
    model = classifier().train()
    model.classifier.eval()
    export(model, tmp_path / "out")
    assert model.training
    assert not model.classifier.training


# --- the clean process -----------------------------------------------------------------------------------------------

SAVE_AGAIN = """
import runpy, socket, sys
from pathlib import Path

class Refusing(socket.socket):
    def connect(self, address):
        raise SystemExit(f"reached for {address}")

socket.socket = Refusing
folder, again, verify_bundle = sys.argv[1:]
tools = runpy.run_path(verify_bundle)
sys.meta_path.insert(0, tools["PackageBlocker"]("vitweave"))
tools["open_bundle"](folder, "AutoModelForSemanticSegmentation").save_pretrained(again)

from transformers.dynamic_module_utils import get_class_from_dynamic_module
kind = get_class_from_dynamic_module(tools["own_processors"](Path(folder))["pil"], folder)
kind.register_for_auto_class()  # what AutoImageProcessor does
kind.from_pretrained(folder).save_pretrained(again)
"""


@pytest.mark.slow
def test_an_export_loads_without_vitweave_and_again_after_the_user_saved_it(tmp_path):
    model = segmenter()
    folder = export(model, tmp_path / "out", SegmentationImageProcessorPil())  # loads it and compares the logits

    again, work = tmp_path / "again", tmp_path / "work"
    work.mkdir()
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", SAVE_AGAIN, str(folder), str(again), verify_bundle.__file__]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    pixels = random_image(model.config)
    expected = verify_bundle.output_tensors(model(**pixels))
    verify_bundle.check_bundle(again, work, "AutoModelForSemanticSegmentation", "vitweave", pixels, expected)
    for place in (folder, again):  # and with vitweave, by its own class
        loaded = AutoModelForSemanticSegmentation.from_pretrained(place)
        assert type(loaded) is DensePredictorForSemanticSegmentation
        torch.testing.assert_close(loaded(**pixels).logits, expected["output.logits"])
    assert list(verify_bundle.own_processors(again).values()) == [
        "image_processing_pil_segmentation.SegmentationImageProcessorPil"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("head_type", ["linear", "dpt"])
def test_a_depth_model_leaves_with_its_code(tmp_path, head_type):
    torch.manual_seed(0)
    backbone = SpecializedViTConfig(**TINY, out_indices=[1, 3], apply_layernorm=False)
    config = DensePredictorConfig(backbone_config=backbone, head_type=head_type, max_depth=80.0)
    model = DensePredictorForDepthEstimation(config).eval()
    size = {"height": 28, "width": 28}
    folder = export(model, tmp_path / "out", DPTImageProcessorPil(size=size))  # loads it and compares the depths
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForDepthEstimation"] == "modeling_depth.DensePredictorForDepthEstimation"
    assert {"dpt_neck.py", "depth_losses.py", "class_tokens.py"} < {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_a_retriever_over_a_layer_fusion_leaves_with_its_code(tmp_path):
    torch.manual_seed(0)
    vision = {"model_type": "layer_fusion_vision", "encoder_config": {"model_type": "specialized_vit", **TINY}}
    model = retriever(vision_config=vision | {"layers": [1, 3]}, contrastive_loss="siglip").eval()
    folder = export(model, tmp_path / "out", PROCESSOR)  # loads it and compares the embeddings
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForZeroShotImageClassification"].startswith("modeling_image_text_retriever.")
    assert "pipeline_tag: zero-shot-image-classification" in (folder / "README.md").read_text()
    assert {"modeling_layer_fusion.py", "layer_fusion_film.py", "gather.py"} < {file.name for file in folder.iterdir()}


@pytest.mark.slow
def test_a_tower_over_nested_composites_leaves_with_its_code(tmp_path):
    torch.manual_seed(0)
    fusion = {"model_type": "layer_fusion_vision", "encoder_config": {"model_type": "specialized_vit", **TINY}}
    tower = {"fusion_type": "concat", "fusion_options": {"dense": True}, "layers": [1, 3]}
    given = {"encoder_configs": [fusion | tower, CONVNEXT], "encoder_options": [{"image_size": 28}, {}]}
    config = tiny_tower(**given, image_size=64)
    folder = export(MultiEncoderModel(config).eval(), tmp_path / "out")  # loads it and compares the tokens
    assert json.loads((folder / "config.json").read_text())["auto_map"]["AutoModel"].endswith(".MultiEncoderModel")


@pytest.mark.slow
def test_a_vision_language_model_leaves_with_its_code_and_processor(tmp_path):
    torch.manual_seed(0)
    model = MultiEncoderVlmForConditionalGeneration(tiny_vlm_config()).eval()
    folder = export(model, tmp_path / "out", tiny_vlm_processor())  # loads it and compares the logits
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageTextToText"].endswith(".MultiEncoderVlmForConditionalGeneration")
    assert {"tokenizer.json", "processor_config.json", "processing_multi_encoder_vlm.py"} < {
        file.name for file in folder.iterdir()
    }


@pytest.mark.slow
@pytest.mark.parametrize("stream", [{"model_type": "segformer"}, {"model_type": "vit", **TINY}])
def test_a_model_of_several_sensors_leaves_with_its_code(tmp_path, stream):
    torch.manual_seed(0)
    small = {"hidden_sizes": [32, 32, 32, 32], "depths": [1] * 4, "num_attention_heads": [1] * 4}
    stream = {**stream, **(small if stream["model_type"] == "segformer" else {"patch_size": 7})}
    stream.pop("num_labels", None)
    config = ModalityFusionConfig(stream_config=stream, decoder_hidden_size=32, num_labels=3)
    model = ModalityFusionForSemanticSegmentation(config).eval()
    folder = export(model, tmp_path / "out", ModalityImageProcessorPil())  # loads it and compares the logits
    assert (folder / "modality_fusion_gemini.py").is_file()


@pytest.mark.slow
def test_a_model_that_draws_leaves_with_its_code_and_its_judge_stays(tmp_path):
    model = tiny_generator()
    folder = export(model, tmp_path / "out", ModalityImageProcessorPil())  # loads it and compares the images
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForImageToImage"].endswith(".ModalityFusionForImageToImage")
    assert (folder / "modality_fusion_token_exchange.py").is_file()
    with pytest.raises(ValueError, match=r"expected one of the classes.*ModalityFusionForImageToImage"):
        export(ModalityAdversarialTranslator.around(model), tmp_path / "pair")


def test_a_blocked_package_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [verify_bundle.PackageBlocker("wave"), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="blocked"):
        __import__("wave")


@pytest.mark.parametrize(
    ("got", "reason"),
    [
        ({"output.logits": torch.ones(1, 3) * 1.01}, "differs by 0.01"),
        ({"output.logits": torch.full((1, 3), float("nan"))}, "differs by nan"),
        ({"output.features": torch.ones(1, 3)}, "returns"),
    ],
)
def test_other_outputs_are_noticed(monkeypatch, tmp_path, got, reason):
    def run(command, **options):
        save_file(got, tmp_path / "outputs.safetensors")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(verify_bundle.subprocess, "run", run)
    expected = {"output.logits": torch.ones(1, 3)}
    with pytest.raises(RuntimeError, match=reason):
        verify_bundle.check_bundle(tmp_path, tmp_path, "AutoModel", "vitweave", {}, expected)


def test_half_precision_is_compared_loosely():
    model = classifier()
    assert verify_bundle.tolerance_of(model) == 1e-4
    assert verify_bundle.tolerance_of(model.to(torch.bfloat16)) == 5e-2


def test_outputs_are_compared_at_every_depth():
    output = {"logits": torch.ones(2), "feature_maps": (torch.zeros(1), torch.ones(1)), "ids": torch.ones(1).long()}
    assert sorted(verify_bundle.output_tensors(output)) == [
        "output.feature_maps.0",
        "output.feature_maps.1",
        "output.logits",
    ]


# --- failures leave nothing ------------------------------------------------------------------------------------------


def test_a_failed_check_leaves_no_folder(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("the exported folder does not load")

    monkeypatch.setattr(export_module, "check_bundle", fail)
    with pytest.raises(RuntimeError, match="does not load"):
        export(classifier(), tmp_path / "deep" / "out")
    assert not list((tmp_path / "deep").iterdir())


def test_a_failed_check_leaves_the_old_folder(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr(export_module, "flatten", lambda *args: (_ for _ in ()).throw(ValueError("no source")))
    with pytest.raises(ValueError, match="no source"):
        export(classifier(), saved, overwrite=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_folder_in_use_is_replaced_only_on_demand(saved, tmp_path):
    (saved / "stale.py").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        export(classifier(), saved, verify=False)
    export(classifier(), saved, overwrite=True, verify=False)
    assert (saved / "README.md").exists()
    assert not (saved / "stale.py").exists()

    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").touch()
    with pytest.raises(FileExistsError, match="holds no model"):
        export(classifier(), other, overwrite=True, verify=False)
    with pytest.raises(FileExistsError, match="is a file"):
        export(classifier(), other / "cat.png", overwrite=True, verify=False)


def test_foreign_models_and_processors_are_refused(tmp_path):
    dinov2 = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28))
    with pytest.raises(ValueError, match="expected a vitweave model, got model_type 'dinov2'"):
        export(dinov2, tmp_path / "out")
    with pytest.raises(ValueError, match=r"expected a vitweave model, got torch\.nn"):
        export(torch.nn.Linear(2, 2), tmp_path / "out")

    class Variant(SpecializedViTModel):
        pass

    with pytest.raises(ValueError, match="expected one of the classes"):
        export(Variant(SpecializedViTConfig(**TINY)), tmp_path / "out")

    class OwnProcessor(BitImageProcessorPil):
        pass

    with pytest.raises(ValueError, match="expected an image processor of vitweave or transformers"):
        export(classifier(), tmp_path / "out", OwnProcessor())
    assert not list(tmp_path.iterdir())


def test_adapters_must_be_merged_first(tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(classifier(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        export(adapted, tmp_path / "out")
    assert export(adapted.merge_and_unload(), tmp_path / "out", verify=False).is_dir()


# --- loading what to export ------------------------------------------------------------------------------------------


def test_a_saved_model_is_loaded_by_its_own_class(saved):
    model = load_model(saved)
    assert type(model) is SpecializedViTForImageClassification
    assert not model.training
    assert type(load_processor(saved)).__name__.startswith("BitImageProcessor")
    (saved / "preprocessor_config.json").unlink()
    assert load_processor(saved) is None


def test_a_card_beside_the_model_is_taken_along(saved, tmp_path):
    assert load_card(saved) == CardInfo()
    CardInfo(license="mit", limitations="One microscope.").save(saved)
    folder = export(load_model(saved), tmp_path / "out", card=load_card(saved), verify=False)
    assert load_card(folder) == load_card(saved)
    assert "One microscope." in (folder / "README.md").read_text()


def test_code_beside_a_model_is_never_run(saved):
    code = f"open({str(saved / 'ran')!r}, 'w').close()\nfrom transformers import ViTConfig as Evil\n"
    (saved / "evil.py").write_text(code)
    edit_json(saved / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})
    edit_json(saved / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Evil"})
    load_model(saved)
    load_processor(saved)
    assert not (saved / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "vit"}, "got model_type 'vit'; vitweave has"),
        ({"model_type": None}, "got model_type None"),
        ({"architectures": ["EvilModel"]}, "names the class 'EvilModel', expected one of"),
        ({"architectures": None}, "names the class None"),
    ],
)
def test_a_config_naming_a_foreign_class_is_refused(saved, changes, reason):
    edit_json(saved / "config.json", **changes)
    with pytest.raises(ValueError, match=reason):
        load_model(saved)


def test_a_place_without_a_model_is_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_model(tmp_path)
    for place in (tmp_path / "absent", saved / "config.json", "./absent"):
        with pytest.raises(FileNotFoundError, match="expected a folder or a Hub id"):
            load_model(place)


def test_damaged_weights_are_refused(saved):
    weights = saved / "model.safetensors"
    tensors = load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or damaged file"):
        load_model(saved)
    tensors.pop("classifier.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors of SpecializedViTForImageClassification.*classifier\.weight"):
        load_model(saved)
    weights.unlink()
    torch.save(tensors, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"expected model\.safetensors in .*a pickle"):
        load_model(saved)


# --- pushing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub that remembers the calls and what was uploaded."""
    calls = []

    class Hub:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **options):
            calls.append(("create_repo", repo_id, options))
            return SimpleNamespace(repo_id=f"someone/{repo_id}")

        def create_branch(self, repo_id, **options):
            calls.append(("create_branch", repo_id, options))

        def upload_folder(self, folder_path, **options):
            texts = {path.name: path.read_bytes() for path in folder_path.iterdir()}
            calls.append(("upload_folder", texts, options))
            return "commit"

    monkeypatch.setattr(export_module, "HfApi", Hub)
    return calls


def test_pushing_uploads_the_whole_export(hub):
    options = {"private": True, "token": "t", "revision": "dev", "tags": ["cells"], "verify": False}
    assert push_to_hub_with_code(classifier(), "vit-cells", card=CardInfo(license="mit"), **options) == "commit"
    assert [call[0] for call in hub] == ["token", "create_repo", "create_branch", "upload_folder"]
    assert hub[1][2] == {"private": True, "exist_ok": True}
    _, files, upload = hub[-1]
    assert upload["repo_id"] == "someone/vit-cells"
    assert upload["revision"] == "dev"
    assert {"model.safetensors", "modeling_specialized_vit.py"} < set(files)
    readme = files["README.md"].decode()
    assert '.from_pretrained("vit-cells", trust_remote_code=True)' in readme
    assert "- cells" in readme
    assert "license: mit" in readme


def test_a_model_pushes_itself_with_its_code(hub, tmp_path):
    assert classifier().push_to_hub("vit-cells", with_code=True, processor=PROCESSOR, verify=False) == "commit"
    _, files, _ = hub[-1]
    assert {"preprocessor_config.json", "modeling_specialized_vit.py"} < set(files)
    # the published method cannot publish again: the exporter stays in the library
    assert "pip install vitweave" in files["pretrained.py"].decode()
    assert "export.py" not in files
    with pytest.raises(TypeError, match="processor"):
        classifier().push_to_hub("vit-cells", processor=PROCESSOR)


def test_nothing_is_created_on_the_hub_when_the_check_fails(hub, monkeypatch):
    def fail(*args):
        raise RuntimeError("differs")

    monkeypatch.setattr(export_module, "check_bundle", fail)
    with pytest.raises(RuntimeError, match="differs"):
        push_to_hub_with_code(classifier(), "someone/vit")
    assert not hub


@pytest.mark.parametrize(("size", "expected"), [(28, (1, 3, 28, 28)), ((14, 28), (1, 3, 14, 28))])
def test_the_check_uses_an_image_of_the_configs_size(size, expected):
    pixels = random_image(SpecializedViTConfig(**(TINY | {"image_size": size})))["pixel_values"]
    assert tuple(pixels.shape) == expected
    assert np.isfinite(pixels.numpy()).all()

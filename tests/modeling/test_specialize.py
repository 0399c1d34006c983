"""Specialising a vanilla ViT changes no output, and can be undone."""

import os
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    IJepaConfig,
    IJepaModel,
    PreTrainedModel,
    ResNetConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)
from vanilla_hosts import BACKBONE_HOSTS, BASE_HOSTS, CLASSIFIER_HOSTS, MLP, SHAPE, TEXT, randomized, run_host

from vitweave.modeling.modeling_specialized_vit import (
    SpecializedViTBackbone,
    SpecializedViTForImageClassification,
    SpecializedViTModel,
)
from vitweave.modeling.specialize import specialize

FLAGS = {
    "norm": {"qkv_blocks": "none"},
    "norm+qkv": {},
    "kv": {"qkv_parts": "kv", "qkv_blocks": 2},
    "proj+mlp": {"proj_blocks": "first_third", "mlp_blocks": [1]},
    "final_norm": {"specialize_final_norm": True, "specialize_layer_scale": False},
    "register_cls": {"register_role": "cls", "qkv_blocks": "all"},
    "rank": {"cls_rank": 4, "cls_alpha": 8, "proj_blocks": [0], "mlp_blocks": [2]},
    "everything": {
        "qkv_blocks": "all",
        "proj_blocks": "all",
        "mlp_blocks": "all",
        "specialize_final_norm": True,
        "register_role": "cls",
    },
}
NATIVE, OTHER = (32, 32), (40, 64)
DATA = os.environ.get("VITWEAVE_DATA_DIR")


def pixels(size: tuple[int, int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2)).to(dtype)


def assert_equal_outputs(host: PreTrainedModel, model: PreTrainedModel, images: torch.Tensor, tolerance: float):
    expected = run_host(host, images, output_hidden_states=True)
    with torch.no_grad():
        actual = model(images, output_hidden_states=True)
    pairs = [(expected[0], actual[0]), *zip(expected.hidden_states, actual.hidden_states, strict=True)]
    if expected.get("pooler_output") is not None:
        pairs.append((expected.pooler_output, actual.pooler_output))
    for wanted, got in pairs:
        torch.testing.assert_close(got, wanted, atol=tolerance, rtol=0)


def assert_same_weights(restored: PreTrainedModel, host: PreTrainedModel):
    assert type(restored) is type(host)
    expected, actual = host.state_dict(), restored.state_dict()
    assert list(actual) == list(expected)
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("family", BASE_HOSTS)
def test_outputs_stay_the_same_and_back(family: str, flags: str):
    host = randomized(BASE_HOSTS[family]())
    model = SpecializedViTModel.from_vit(host, **FLAGS[flags])
    assert_equal_outputs(host, model, pixels(NATIVE), tolerance=1e-12)
    assert_equal_outputs(host, model, pixels(OTHER), tolerance=1e-6)  # some hosts resample positions in float32
    assert_same_weights(model.to_vanilla(), host)
    assert_equal_outputs(host.float(), model.float(), pixels(NATIVE, torch.float32), tolerance=1e-5)


@pytest.mark.parametrize("flags", ["norm+qkv", "everything"])
@pytest.mark.parametrize("family", CLASSIFIER_HOSTS)
def test_a_classifier_keeps_its_head(family: str, flags: str):
    host = randomized(CLASSIFIER_HOSTS[family]())
    model = SpecializedViTForImageClassification.from_vit(host, **FLAGS[flags])
    assert_equal_outputs(host, model, pixels(NATIVE), tolerance=1e-12)
    assert model.config.id2label == host.config.id2label
    restored = model.to_vanilla()
    assert_same_weights(restored, host)
    assert restored.config.id2label == host.config.id2label


@pytest.mark.parametrize("family", BACKBONE_HOSTS)
def test_a_backbone_keeps_its_maps(family: str):
    host = randomized(BACKBONE_HOSTS[family]())
    model = SpecializedViTBackbone.from_vit(host)
    expected = run_host(host, pixels(OTHER)).feature_maps
    with torch.no_grad():
        actual = model(pixels(OTHER)).feature_maps
    assert len(expected) == len(actual) == 2
    for wanted, got in zip(expected, actual, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
    assert_same_weights(model.to_vanilla(), host)


@pytest.mark.parametrize("family", ["vit", "deit", "beit-absolute", "clip"])
def test_dropout_falls_on_the_same_values(family: str):
    host = randomized(BASE_HOSTS[family]())
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"):
        if hasattr(host.config, name):
            setattr(host.config, name, 0.3)
    host.config.drop_path_rate = 0.0
    state = host.state_dict()
    host = type(host)(host.config).double().train()
    host.load_state_dict(state)
    model = SpecializedViTModel.from_vit(host)
    assert model.training
    torch.manual_seed(3)
    expected = run_host(host, pixels(NATIVE)).last_hidden_state
    torch.manual_seed(3)
    torch.testing.assert_close(model(pixels(NATIVE)).last_hidden_state, expected, atol=1e-12, rtol=0)


def test_backbone_and_base_from_a_classifier(tmp_path: Path):
    host = randomized(CLASSIFIER_HOSTS["vit"](), torch.float32)
    host.save_pretrained(tmp_path)
    backbone = SpecializedViTBackbone.from_vit(tmp_path, out_indices=[1, 3], apply_layernorm=False)
    states = run_host(host, pixels(NATIVE, torch.float32), output_hidden_states=True).hidden_states
    with torch.no_grad():
        maps = backbone(pixels(NATIVE, torch.float32)).feature_maps
    torch.testing.assert_close(maps[0].flatten(2).transpose(1, 2), states[1][:, 1:], atol=1e-5, rtol=0)
    assert set(backbone.conversion_report.dropped) == {"classifier.weight", "classifier.bias"}
    base = SpecializedViTModel.from_vit(str(tmp_path))
    assert base.pooler is None  # a random pooler must not slip in
    assert type(base.to_vanilla()) is ViTModel


def test_a_base_model_gets_a_new_head():
    host = randomized(BASE_HOSTS["vit"]())
    model = SpecializedViTForImageClassification.from_vit(host, num_labels=7)
    assert model.classifier.weight.shape == (7, 32)
    assert model.conversion_report.created == ["classifier.weight", "classifier.bias"]
    assert "pooler.dense.weight" in model.conversion_report.dropped
    changed = SpecializedViTForImageClassification.from_vit(randomized(CLASSIFIER_HOSTS["vit"]()), num_labels=3)
    assert changed.classifier.weight.shape == (3, 32)
    assert "classifier.weight" in changed.conversion_report.dropped


@pytest.mark.parametrize("family", CLASSIFIER_HOSTS)
def test_saved_and_opened_by_auto_class(family: str, tmp_path: Path):
    host = randomized(CLASSIFIER_HOSTS[family](), torch.float32)
    host.save_pretrained(tmp_path / "vanilla")
    SpecializedViTForImageClassification.from_vit(tmp_path / "vanilla").save_pretrained(tmp_path / "specialised")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "specialised")
    assert_equal_outputs(host, model, pixels(NATIVE, torch.float32), tolerance=1e-5)
    assert_same_weights(model.to_vanilla(), host)
    base = AutoModel.from_pretrained(tmp_path / "specialised")
    assert isinstance(base, SpecializedViTModel)


def test_report_counts_every_value():
    host = randomized(BASE_HOSTS["dinov2_with_registers"]())
    model = SpecializedViTModel.from_vit(host, cls_rank=2, attention_bias=False)
    report = model.conversion_report
    assert report.counts["copied"] == sum(parameter.numel() for parameter in host.parameters())
    groups = (report.copied, report.cloned, report.created)
    assert sorted(name for group in groups for name in group) == sorted(name for name, _ in model.named_parameters())
    assert report.cloned["encoder.layer.0.norm1_cls.weight"] == "encoder.layer.0.norm1.weight"
    assert all("_cls_" in name for name in report.created)
    assert "Dinov2WithRegistersModel -> SpecializedViTModel" in str(report)


def test_dtype_mode_attention_and_frozen_weights_are_kept():
    host = BASE_HOSTS["vit_mae"]().to(torch.bfloat16).train()
    host.set_attn_implementation("eager")
    host.layernorm.requires_grad_(False)
    model = SpecializedViTModel.from_vit(host, specialize_final_norm=True)
    assert model.dtype == torch.bfloat16
    assert model.training
    assert model.config._attn_implementation == "eager"
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    norms = {f"layernorm{suffix}.{leaf}" for suffix in ("", "_cls") for leaf in ("weight", "bias")}
    assert frozen == {"embeddings.position_embeddings", *norms}


def test_an_attention_bias_starts_small_and_warns():
    host = randomized(BASE_HOSTS["dinov2"]())
    with pytest.warns(UserWarning, match="outputs differ"):
        model = SpecializedViTModel.from_vit(host, attention_bias="kv")
    assert not model.encoder.layer[0].attention.bias_k.any()
    with pytest.raises(ValueError, match="bias_k is an attention bias"):
        model.to_vanilla()
    assert_same_weights(model.to_vanilla(strict=False), host)


def test_to_vanilla_names_what_would_be_lost():
    host = randomized(BASE_HOSTS["dinov2"]())
    model = SpecializedViTModel.from_vit(host, cls_rank=2)
    with torch.no_grad():
        model.encoder.layer[1].norm2_cls.weight[3] += 0.5
        model.encoder.layer[0].attention.q_proj_cls_up.weight += 1
    with pytest.raises(ValueError, match=r"2 parameters.*\n.*q_proj_cls_up.weight is not zero\n.*by up to 0.5"):
        model.to_vanilla()
    assert_same_weights(model.to_vanilla(strict=False), host)


def test_heads_of_pretraining_are_left_out():
    mae = ViTMAEForPreTraining(ViTMAEConfig(**SHAPE, **MLP, mask_ratio=0.0, decoder_num_hidden_layers=1))
    report = SpecializedViTModel.from_vit(randomized(mae)).conversion_report
    assert set(report.dropped.values()) == {"decoder of a pretraining task"}
    masked = randomized(ViTForMaskedImageModeling(ViTConfig(**SHAPE, **MLP)))
    model = SpecializedViTModel.from_vit(masked)
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[:, 3:7] = True
    with torch.no_grad():
        expected = masked.vit(pixels(NATIVE), bool_masked_pos=hidden).last_hidden_state
        actual = model(pixels(NATIVE), bool_masked_pos=hidden).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    clip = CLIPModel(CLIPConfig(vision_config={**SHAPE, **MLP}, text_config=TEXT))
    report = SpecializedViTModel.from_vit(randomized(clip)).conversion_report
    assert set(report.dropped.values()) == {"text side or joint space of the host"}


def test_a_full_clip_folder_opens_as_its_vision_tower(tmp_path: Path):
    clip = randomized(CLIPModel(CLIPConfig(vision_config={**SHAPE, **MLP}, text_config=TEXT)), torch.float32)
    clip.save_pretrained(tmp_path)
    model = SpecializedViTModel.from_vit(tmp_path)
    assert_equal_outputs(clip.vision_model, model, pixels(NATIVE, torch.float32), tolerance=1e-5)
    assert model.to_vanilla().config.model_type == "clip_vision_model"


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=32, patch_size=8)), "no class token"),
        (lambda: IJepaModel(IJepaConfig(**SMALL, image_size=32, patch_size=8)), "no class token"),
        (lambda: SwinModel(SwinConfig(image_size=32, embed_dim=8, depths=[1], num_heads=[1])), "hierarchical"),
        (lambda: AutoModel.from_config(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])), "hierarchical"),
    ],
    ids=["siglip", "ijepa", "swin", "resnet"],
)
def test_models_without_class_token_are_refused(host, reason: str):
    with pytest.raises(ValueError, match=f"{reason}.*supported: beit, clip"):
        specialize(host())


def test_bad_flags_are_refused():
    host = BASE_HOSTS["dinov2"]()
    with pytest.raises(ValueError, match="hidden_size follows from the vanilla model"):
        SpecializedViTModel.from_vit(host, hidden_size=64)
    with pytest.raises(ValueError, match="unknown flag 'qkv_block'; did you mean qkv_blocks"):
        SpecializedViTModel.from_vit(host, qkv_block=2)
    with pytest.raises(ValueError, match=r"qkv_blocks has the block indices \[3\]"):
        SpecializedViTModel.from_vit(host, qkv_blocks=[3])
    with pytest.raises(TypeError, match="expected a transformers model, a folder or a Hub id, got Linear"):
        SpecializedViTModel.from_vit(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="already specialised"):
        SpecializedViTModel.from_vit(SpecializedViTModel.from_vit(host))


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path):
    host = ViTModel(ViTConfig(**SHAPE, **MLP))
    host.save_pretrained(tmp_path, state_dict={n: t for n, t in host.state_dict().items() if "layers.1." not in n})
    with pytest.raises(ValueError, match="incomplete"):
        SpecializedViTModel.from_vit(tmp_path)


@pytest.mark.parametrize("model_class", [SpecializedViTModel, SpecializedViTForImageClassification])
def test_a_vanilla_checkpoint_opened_directly_says_what_to_do(tmp_path: Path, model_class):
    Dinov2Model(Dinov2Config(**SHAPE)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_vit"):
        model_class.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    data = pytest.importorskip("skimage.data", reason="needs scikit-image")
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    processor = ViTImageProcessorPil.from_pretrained(Path(DATA) / "vit_tiny_imagenet")
    images = [getattr(data, name)() for name in ("chelsea", "coffee", "astronaut", "rocket")]
    return processor(images, return_tensors="pt")["pixel_values"]


@pytest.mark.skipif(DATA is None, reason="needs the folder vit_tiny_imagenet, named by VITWEAVE_DATA_DIR")
@pytest.mark.parametrize("flags", FLAGS)
def test_pretrained_logits_on_photos(flags: str, photos: torch.Tensor):
    source = Path(DATA) / "vit_tiny_imagenet"
    host = ViTForImageClassification.from_pretrained(source)
    model = SpecializedViTForImageClassification.from_vit(source, **FLAGS[flags])
    with torch.no_grad():
        expected, actual = host(photos).logits, model(photos).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert "cat" in model.config.id2label[actual[0].argmax().item()].lower()
    assert_same_weights(model.to_vanilla(), host)

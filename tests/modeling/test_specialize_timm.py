"""Specialising timm ViTs, which transformers opens through its TimmWrapper."""

from pathlib import Path

import pytest
import torch

from vitweave.modeling.modeling_specialized_vit import (
    SpecializedViTBackbone,
    SpecializedViTForImageClassification,
    SpecializedViTModel,
)

pytestmark = [pytest.mark.torchvision, pytest.mark.slow]
pytest.importorskip("torchvision", reason="needs torchvision")
pytest.importorskip("timm", reason="needs timm")

from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel  # noqa: E402

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "dynamic_img_size": True}
HOSTS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "registers": ("vit_medium_patch16_reg4_gap_256", {"reg_tokens": 4, "global_pool": "token", "fc_norm": False}),
    "mean-pooled": ("vit_tiny_patch16_224", {"global_pool": "avg", "init_values": 0.1}),
    "mean-pooled-normed-tokens": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    "clip": ("vit_base_patch32_clip_224", {}),
    "quick-gelu": ("vit_base_patch32_clip_quickgelu_224", {}),
    "dinov2-swiglu": ("vit_giant_patch14_dinov2", {"mlp_ratio": 4.0, "reg_tokens": 2, "no_embed_class": True}),
    "no-qkv-bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
}
FLAGS = {
    "norm+qkv": {},
    "kv": {"qkv_parts": "kv", "qkv_blocks": 2},
    "rank": {"cls_rank": 4, "proj_blocks": [0]},
    "everything": {
        "qkv_blocks": "all",
        "proj_blocks": "all",
        "mlp_blocks": "all",
        "specialize_final_norm": True,
        "register_role": "cls",
    },
}


def build(name: str, model_class: type, dtype: torch.dtype = torch.float64, **config):
    architecture, arguments = HOSTS[name]
    arguments = {**TINY, **arguments}
    if "reg" in architecture:
        arguments["class_token"] = True
    model = model_class(TimmWrapperConfig(architecture=architecture, model_args=arguments, **config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.to(dtype).eval()


def pixels(height: int, width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2)).to(dtype)


def assert_same_weights(restored, host):
    assert type(restored) is type(host)
    expected, actual = host.state_dict(), restored.state_dict()
    assert list(actual) == list(expected)
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", HOSTS)
def test_outputs_stay_the_same_and_back(name: str, flags: str):
    host = build(name, TimmWrapperModel)
    model = SpecializedViTModel.from_vit(host, **FLAGS[flags])
    for images, tolerance in ((pixels(32, 32), 1e-12), (pixels(40, 64), 1e-6)):
        with torch.no_grad():
            expected, actual = host(images), model(images, output_hidden_states=True)
            states = host(images, output_hidden_states=True).hidden_states
        torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=tolerance, rtol=0)
        torch.testing.assert_close(actual.pooler_output, expected.pooler_output, atol=tolerance, rtol=0)
        for wanted, got in zip(states, actual.hidden_states[1:], strict=True):  # timm gives maps of the patches
            got = got[:, model.config.num_prefix_tokens :].transpose(1, 2).unflatten(2, wanted.shape[2:])
            torch.testing.assert_close(got, wanted, atol=tolerance, rtol=0)
    assert_same_weights(model.to_vanilla(), host)
    with torch.no_grad():
        images = pixels(32, 32, torch.float32)
        wanted, got = host.float()(images).last_hidden_state, model.float()(images).last_hidden_state
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vit", "deit3", "mean-pooled"])
def test_a_classifier_keeps_its_head(name: str, tmp_path: Path):
    host = build(name, TimmWrapperForImageClassification, num_labels=5)
    model = SpecializedViTForImageClassification.from_vit(host)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels(32, 32)).logits, host(pixels(32, 32)).logits, atol=1e-12, rtol=0)
    assert_same_weights(model.to_vanilla(), host)
    host.save_pretrained(tmp_path)
    opened = SpecializedViTForImageClassification.from_vit(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(opened(pixels(32, 32)).logits, host(pixels(32, 32)).logits, atol=1e-5, rtol=0)
    maps = SpecializedViTBackbone.from_vit(host, out_indices=[1, 3])(pixels(32, 32)).feature_maps
    assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 4)] * 2


@pytest.mark.parametrize(
    ("architecture", "arguments", "reason"),
    [
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, "no class token"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, "norms on queries and keys"),
        ("vit_tiny_patch16_224", {"reg_tokens": 2}, "position embeddings for its registers"),
        ("vit_tiny_patch16_224", {"global_pool": "map"}, "pooling 'map'"),
        ("deit_tiny_distilled_patch16_224", {}, "VisionTransformerDistilled"),
        ("resnet10t", None, "this timm model is a ResNet"),
    ],
)
def test_other_timm_models_are_refused(architecture: str, arguments: dict | None, reason: str):
    arguments = None if arguments is None else {**TINY, **arguments}
    host = TimmWrapperModel(TimmWrapperConfig(architecture=architecture, model_args=arguments))
    with pytest.raises(ValueError, match=reason):
        SpecializedViTModel.from_vit(host)

"""Encoders of releases compute what their formulas say, from their official tensors."""

import pytest
import torch
import torch.nn.functional as F
from official_checkpoints import BLOCKS, DEPTHS, DIMS, cambrian, clip, convnext, llava_hr, random_tensors
from torch import Tensor
from transformers import CLIPVisionConfig, ConvNextConfig, InternVLVisionConfig

from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.multi_encoder_presets import multi_encoder_preset
from vitweave.modeling.conversion.encoder_names import CLIP, CONVNEXT, encoder_names
from vitweave.modeling.conversion.encoder_sizes import resized_encoder
from vitweave.modeling.conversion.release import TOWER, Part, converted
from vitweave.modeling.conversion.release_registry import RELEASES
from vitweave.modeling.convert_multi_encoder import convert_multi_encoder
from vitweave.modeling.own_models import build_model
from vitweave.modeling.vision_encoder import VisionEncoder


def patches_of_clip(state: dict[str, Tensor], pixels: Tensor, heads: int) -> Tensor:
    """EAGLE's CLIP, written down from its description: no class token in the blocks, no norm behind them."""
    state = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = F.conv2d(pixels, state["embeddings.patch_embedding.weight"], stride=14)
    side, table = x.shape[-1], state["embeddings.position_embedding.weight"][1:]
    stored = round(len(table) ** 0.5)
    table = table.T.unflatten(1, (stored, stored))[None]
    x = x + F.interpolate(table, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    x = norm(x.flatten(2).transpose(1, 2), "pre_layrnorm")
    for block in range(BLOCKS):
        layer = f"encoder.layers.{block}"
        y = norm(x, f"{layer}.layer_norm1")
        q, k, v = (
            linear(y, f"{layer}.self_attn.{part}_proj").unflatten(2, (heads, -1)).transpose(1, 2) for part in "qkv"
        )
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{layer}.self_attn.out_proj")
        y = linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), f"{layer}.mlp.fc2")
    return x


@pytest.mark.parametrize("side", [56, 84])
def test_clip_without_its_class_token(side):
    state = random_tensors(clip())
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    encoder = VisionEncoder(config, final_norm=False, class_token="drop_before").eval()
    encoder.model.load_state_dict(converted([Part("", "", CLIP)], state), strict=True)
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = encoder(pixels).patches[0]
    torch.testing.assert_close(found, patches_of_clip(state, pixels, heads=2), atol=1e-4, rtol=1e-4)


def stages_of_convnext(state: dict[str, Tensor], pixels: Tensor, scale: str) -> list[Tensor]:
    """ConvNeXt, written down from timm's names."""

    def norm(x, name):
        last = F.layer_norm(x.movedim(1, -1), x.shape[1:2], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)
        return last.movedim(-1, 1)

    x, stages = F.conv2d(pixels, state["stem.0.weight"], state["stem.0.bias"], stride=4), []
    x = norm(x, "stem.1")
    for stage, depth in enumerate(DEPTHS):
        if stage:
            down = f"stages.{stage}.downsample"
            x = F.conv2d(norm(x, f"{down}.0"), state[f"{down}.1.weight"], state[f"{down}.1.bias"], stride=2)
        for number in range(depth):
            block = f"stages.{stage}.blocks.{number}"
            weight, bias = state[f"{block}.conv_dw.weight"], state[f"{block}.conv_dw.bias"]
            y = norm(F.conv2d(x, weight, bias, padding=3, groups=x.shape[1]), f"{block}.norm").movedim(1, -1)
            y = F.gelu(F.linear(y, state[f"{block}.mlp.fc1.weight"], state[f"{block}.mlp.fc1.bias"]))
            y = F.linear(y, state[f"{block}.mlp.fc2.weight"], state[f"{block}.mlp.fc2.bias"])
            x = x + (y * state[f"{block}.{scale}"]).movedim(-1, 1)
        stages.append(x)
    return stages


@pytest.mark.parametrize("scale", ["gamma", "weight"])
def test_convnext(scale):
    state = random_tensors(convnext(scale, head=True))
    encoder = VisionEncoder(
        ConvNextConfig(hidden_sizes=DIMS, depths=DEPTHS), layers=[1, 2, 3, 4], final_norm=False
    ).eval()
    encoder.model.load_state_dict(converted([Part("", "", CONVNEXT)], state), strict=True)
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = encoder(pixels).feature_maps
    for ours, expected in zip(found, stages_of_convnext(state, pixels, scale), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_an_encoder_that_no_release_has():
    config = MultiEncoderConfig(encoder_configs=[{"model_type": "vit"}])
    with pytest.raises(ValueError, match=r"type 'vit', which no release has; known: \['clip_vision_model'"):
        encoder_names(config, 0)


# Sizes ---------------------------------------------------------------------------------------------------------------

NOT_IN_TENSORS = {"eva02_det_vit": ("image_size", "window_size", "window_blocks"), "clip_vision_model": ("hidden_act",)}


@pytest.mark.parametrize(
    ("preset", "index"), [("cambrian", 0), ("leo", 0), *(("eagle-x5", k) for k in (0, 1, 2, 3, 4))]
)
def test_sizes_of_encoders_follow_from_their_tensors(preset, index):
    tiny = multi_encoder_preset(preset, tiny=True).encoder_configs[index]
    if tiny.model_type == "convnext":
        full = ConvNextConfig()
    else:
        full = multi_encoder_preset(preset).encoder_configs[index]
        full.num_attention_heads = full.hidden_size // 16  # as wide as those of the tiny one
    if tiny.model_type == "pix2struct_vision_model":
        full.d_kv = tiny.d_kv
    with torch.device("meta"):
        shapes = build_model(tiny).state_dict()
    found = resized_encoder(full, shapes)
    with torch.device("meta"):
        again = build_model(found).state_dict()
    assert {name: tensor.shape for name, tensor in again.items()} == {name: t.shape for name, t in shapes.items()}
    kept = NOT_IN_TENSORS.get(tiny.model_type, ())
    for name in ("image_size", "patch_size", "window_size", "global_attn_indexes", "num_attention_heads", "hidden_act"):
        if hasattr(tiny, name) and name not in kept:
            assert getattr(found, name) == getattr(tiny, name), name
    assert resized_encoder(tiny, shapes) is tiny


def test_sizes_of_a_norm_of_queries_and_keys():
    config = InternVLVisionConfig(
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        **{"image_size": [56, 56], "patch_size": [14, 14], "use_mean_pooling": True},
        **{"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False},
    )
    with torch.device("meta"):
        shapes = build_model(config).state_dict()
    plain = InternVLVisionConfig(hidden_size=64, num_attention_heads=4, attention_bias=True, use_mean_pooling=True)
    found = resized_encoder(plain, shapes)
    assert (found.norm_type, found.use_qk_norm, found.attention_bias) == ("rms_norm", True, False)


def test_a_tower_of_other_sizes_than_its_preset_needs_no_config():
    state = random_tensors(llava_hr(clip_width=64, side=24))
    model, report = convert_multi_encoder(state, "llava-hr", tower_only=True)
    clip_config, slow = model.config.encoder_configs
    assert (clip_config.hidden_size, clip_config.num_attention_heads, clip_config.image_size) == (64, 1, 336)
    assert (slow.hidden_sizes, slow.depths) == (DIMS, DEPTHS)
    assert model.config.fusion_options["adapter_layers"] == [1, 2, 3]
    assert (model.config.num_tokens, model.config.fused_size, model.config.image_size) == (1024, 64, 1024)
    assert not report.new
    without = {name: tensor for name, tensor in state.items() if "align_stages_latent" not in name}
    first_stage, _ = convert_multi_encoder(without, "llava-hr", tower_only=True)
    assert first_stage.config.fusion_options["adapter_layers"] == []
    with pytest.raises(
        ValueError, match="cannot tell the attention heads of a 'clip_vision_model' encoder of width 32"
    ):
        convert_multi_encoder(random_tensors(llava_hr()), "llava-hr", tower_only=True)


def test_sizes_of_connectors():
    preset = multi_encoder_preset("cambrian")
    release = RELEASES["cambrian"]
    tower = converted(release.parts(preset), random_tensors(cambrian(depth=2)))
    tower = {name.removeprefix(TOWER): tensor for name, tensor in tower.items()}
    options = release.sizes(preset, tower)["fusion_options"]
    assert (options["vision_hidden_size"], options["depth"]) == (32, 2)
    assert options["tower_sides"] == [24, 24, 24, 96]
    with pytest.raises(ValueError, match=r"has 2 query groups, whose sides .*query_sides"):
        release.sizes(preset, tower | {"fusion.query": torch.zeros(2, 32)})
    with pytest.raises(ValueError, match="16 heads divide, got 24"):
        release.sizes(preset, tower | {"fusion.query": torch.zeros(1, 24)})
    leo = RELEASES["leo"].sizes(preset, {"fusion.projectors.0.linear_2.bias": torch.zeros(96)})
    assert leo == {"hidden_size": 96}

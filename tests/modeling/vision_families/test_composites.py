"""Our composites as encoders of other composites: one layer, which is what they return."""

from types import SimpleNamespace

import pytest
import torch
from tiny_encoders import CASES, VIT, build, images
from torch import nn
from transformers import ViTConfig, ViTModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vitweave.configuration.configuration_base import VitweaveConfig
from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig
from vitweave.configuration.encoder_facts import encoder_facts
from vitweave.configuration.reductions import Reduction, ceil_reduction, floor_reduction, in_one
from vitweave.modeling import own_models
from vitweave.modeling.modeling_layer_fusion import LayerFusionForImageClassification, LayerFusionModel
from vitweave.modeling.pretrained import VitweavePreTrainedModel
from vitweave.modeling.vision_encoder import VisionEncoder, find_vision_model

HOSTS = {"vit": [1, 3], "dinov2_with_registers": [1, 3], "siglip_vision_model": [1, 3], "swin": [3], "convnext": [4]}


def fused(name: str, fusion_type: str = "attentive_probe", **options) -> LayerFusionModel:
    """A layer fusion whose read-outs show."""
    model = LayerFusionModel.from_encoder(
        build(name), layers=HOSTS[name], fusion_type=fusion_type, fusion_options=options
    ).eval()
    with torch.no_grad():
        for key, parameter in model.fusion.named_parameters():
            if key.startswith("gamma_"):
                parameter.normal_()
    return model


@pytest.mark.parametrize("fusion_type", ["attentive_probe", "film"])
@pytest.mark.parametrize("name", sorted(HOSTS))
@torch.no_grad()
def test_features_of_a_layer_fusion_are_its_outputs(name, fusion_type):
    model, pixel_values = fused(name, fusion_type), images(name)
    expected, inner = model(pixel_values), VisionEncoder(model.encoder.model)(pixel_values)
    encoder = VisionEncoder(model, keep_final=True)
    assert encoder.model is model and encoder.layers == (1,) == (encoder.num_layers,)
    features = encoder(pixel_values)
    together = torch.cat([features.class_tokens[0], features.registers[0], features.patches[0]], dim=1)
    assert torch.equal(together, expected.last_hidden_state)
    assert torch.equal(features.pooled, expected.pooler_output)
    assert torch.equal(torch.cat(features.final, dim=1), expected.last_hidden_state)
    assert torch.equal(features.patches[0], inner.patches[0]) == (fusion_type != "film")
    assert not torch.allclose(features.pooled, inner.pooled) or fusion_type == "film"
    assert torch.equal(encoder(pixel_values, all_layers=True).patches[0], features.patches[0])
    assert torch.equal(VisionEncoder(model, final_norm=False)(pixel_values).patches[0], features.patches[0])


@pytest.mark.parametrize("name", sorted(HOSTS))
@pytest.mark.parametrize("size", [(64, 96), (75, 102)])
@torch.no_grad()
def test_facts_of_a_layer_fusion_are_known_from_its_config(name, size):
    config = LayerFusionConfig(encoder_config={"model_type": name, **CASES[name]}, layers=HOSTS[name])
    facts, inner = encoder_facts(config), encoder_facts(config.encoder_config)
    encoder = VisionEncoder(config)
    features = encoder(images(name, 1, size))
    assert encoder.facts == facts
    assert encoder.grids_for(*size) == features.grids == (inner.grid_for(*size),)
    assert facts.strides[-1] == inner.strides[-1] and features.pooled.shape == (1, facts.pooled_size)
    assert features.feature_maps[0].shape == (1, facts.hidden_sizes[1], *features.grids[0])
    assert (facts.num_class_tokens, facts.num_registers) == (inner.num_class_tokens, inner.num_registers)


def test_several_reductions_in_one():
    rows = [
        Reduction((7, 3), (4, 2), (3, 1)),
        ceil_reduction(2),
        floor_reduction((3, 1)),
        Reduction((3, 5), (2, 2), (1, 2)),
    ]
    for size in range(40, 120):
        grid = [size, size + 1]
        for reduction in rows:
            for axis, (kernel, stride, padding) in enumerate(zip(*reduction, strict=True)):
                grid[axis] = (grid[axis] + 2 * padding - kernel) // stride + 1
        kernel, stride, padding = in_one(rows)
        assert [
            (side + 2 * p - k) // s + 1 for side, k, s, p in zip((size, size + 1), kernel, stride, padding, strict=True)
        ] == grid


@torch.no_grad()
def test_of_a_pyramid_the_patches_stay_those_of_the_encoder():
    model, pixel_values = fused("vit", "fpn"), images("vit")
    assert torch.equal(
        VisionEncoder(model)(pixel_values).patches[0], VisionEncoder(build("vit"))(pixel_values).patches[0]
    )


def test_the_outermost_known_model_is_found():
    model = fused("vit")
    assert find_vision_model(model) is model
    assert find_vision_model(nn.Sequential(nn.Identity(), model)) is model
    classifier = LayerFusionForImageClassification(model.config)
    assert VisionEncoder(classifier).model is classifier.layer_fusion
    assert find_vision_model(model.encoder) is model.encoder.model


def test_a_layer_fusion_over_a_layer_fusion_saves_and_loads(tmp_path):
    model = LayerFusionModel.from_encoder(fused("vit"), fusion_type="concat").eval()
    assert model.config.layers == [1] and model.config.encoder_config.model_type == "layer_fusion_vision"
    model.save_pretrained(tmp_path)
    loaded, info = LayerFusionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixel_values = images("vit")
    expected, got = model(pixel_values), loaded(pixel_values)
    assert torch.equal(got.pooler_output, expected.pooler_output)
    assert torch.equal(got.pooler_output, model.encoder.model(pixel_values).pooler_output)  # nothing moved gamma yet
    got.pooler_output.square().sum().backward()
    reached = {name for name, parameter in loaded.named_parameters() if parameter.grad is not None}
    assert any(name.startswith("encoder.model.encoder.model.") for name in reached)
    assert any(name.startswith("encoder.model.fusion.") for name in reached)


@torch.no_grad()
def test_a_nested_layer_fusion_compiles_to_one_graph():
    encoder, pixel_values = VisionEncoder(fused("vit", "film")), images("vit")
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")(pixel_values)
    torch.testing.assert_close(compiled.patches, encoder(pixel_values).patches)
    half = encoder.to(torch.bfloat16)(pixel_values)
    assert half.patches[0].dtype == half.pooled.dtype == torch.bfloat16


def test_what_composites_cannot_do_is_refused():
    encoder, pixel_values = VisionEncoder(fused("vit")), images("vit")
    with pytest.raises(ValueError, match="expected no `after` for LayerFusionModel"):
        encoder(pixel_values, after={1: lambda patches: patches})
    with pytest.raises(ValueError, match=r"expected layers 1\.\.1"):
        VisionEncoder(encoder.model, layers=[3])
    with pytest.raises(ValueError, match="not there for 'layer_fusion_vision'"):
        VisionEncoder(encoder.model, class_token="drop_before")
    with pytest.raises(ValueError, match="expected 3 image channels, got 4"):
        encoder(torch.randn(1, 4, 32, 32))
    with pytest.raises(ValueError, match="smaller than one patch of 8x8"):
        encoder(torch.randn(1, 3, 4, 32))


class TowerConfig(VitweaveConfig):
    """What is read of the config of a tower."""

    model_type = "multi_encoder_vision"
    image_size: int = 40
    fusion_type: str = "channel_concat"
    num_channels: int = 3
    num_tokens: int = 9
    fused_size: int = 32
    fused_grid: tuple | None = (3, 3)

    def plan_for(self, size):
        return SimpleNamespace(grid=(size[0] // 8 - 2, 3))


class Tower(VitweavePreTrainedModel):
    """The tokens of a ViT whose grid has no whole stride."""

    config_class = TowerConfig

    def __init__(self, config):
        super().__init__(config)
        self.encoder_0 = VisionEncoder(ViTModel(ViTConfig(**VIT)))
        self.post_init()

    def forward(self, pixel_values, image_sizes=None, **kwargs):
        grid = (
            self.config.fused_grid
            if pixel_values.shape[-2:] == (40, 40)
            else self.config.plan_for(pixel_values.shape[-2:]).grid
        )
        feature_map = self.encoder_0(pixel_values).feature_maps[0]
        tokens = nn.functional.adaptive_avg_pool2d(feature_map, grid).flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens.mean(dim=1))


@torch.no_grad()
def test_a_tower_of_encoders_is_one_layer_of_patches(monkeypatch):
    monkeypatch.setitem(own_models.OWN_MODELS, "multi_encoder_vision", lambda: {"model": Tower})
    encoder = VisionEncoder(TowerConfig()).eval()
    for size, grid in (((40, 40), (3, 3)), ((48, 40), (4, 3))):
        pixel_values = torch.randn(2, 3, *size)
        features, expected = encoder(pixel_values), encoder.model(pixel_values)
        assert features.grids == encoder.grids_for(*size) == (grid,)
        assert torch.equal(features.patches[0], expected.last_hidden_state)
        assert torch.equal(features.pooled, expected.pooler_output)
    assert find_vision_model(nn.Sequential(encoder.model)) is encoder.model
    assert features.class_tokens[0].shape[1] == features.registers[0].shape[1] == 0
    over = LayerFusionModel(LayerFusionConfig(encoder_config=TowerConfig(), fusion_type="concat")).eval()
    assert torch.equal(
        over(torch.ones(1, 3, 48, 40)).pooler_output, over.encoder.model(torch.ones(1, 3, 48, 40)).pooler_output
    )


def test_a_tower_without_grid_is_refused():
    with pytest.raises(ValueError, match=r"keeps a grid, got 'query_former', whose 64 tokens have none"):
        encoder_facts(TowerConfig(fused_grid=None, fusion_type="query_former", num_tokens=64))

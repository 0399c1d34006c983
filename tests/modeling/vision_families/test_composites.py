"""Our composites as encoders of other composites: one layer, which is what they return."""

import pytest
import torch
from tiny_encoders import CASES, VIT, build, images
from torch import nn

from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig
from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.encoder_facts import encoder_facts
from vitweave.configuration.reductions import Reduction, ceil_reduction, floor_reduction, in_one
from vitweave.modeling.modeling_layer_fusion import LayerFusionForImageClassification, LayerFusionModel
from vitweave.modeling.modeling_multi_encoder import MultiEncoderModel
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


def tower(**changes) -> MultiEncoderModel:
    """A ViT whose size is fixed, and a ConvNeXt that follows the size of the image, on one grid."""
    config = MultiEncoderConfig(
        encoder_configs=[{"model_type": name, **CASES[name]} for name in ("dinov2_with_registers", "convnext")],
        encoder_options=[{"image_size": 32, "frozen": True}, {"layer": 3}],
        **{"image_size": 64, "fusion_type": "channel_concat", **changes},
    )
    torch.manual_seed(0)
    return MultiEncoderModel(config).eval()


@torch.no_grad()
def test_a_tower_of_encoders_is_one_layer_of_patches():
    model = tower()
    encoder = VisionEncoder(model, keep_final=True)
    assert encoder.model is find_vision_model(nn.Sequential(model)) is model
    assert encoder.facts == encoder_facts(model.config) and encoder.layers == (1,)
    for size, grid in (((64, 64), (4, 4)), ((64, 96), (4, 6))):
        pixel_values = torch.randn(2, 3, *size)
        features, expected = encoder(pixel_values), model(pixel_values)
        assert features.grids == encoder.grids_for(*size) == (grid,)
        assert torch.equal(features.patches[0], expected.last_hidden_state)
        assert torch.equal(features.final[2], expected.last_hidden_state)
        assert torch.equal(features.pooled, expected.pooler_output)
        assert features.feature_maps[0].shape == (2, *encoder.hidden_sizes, *grid)
    assert encoder.strides == ((16, 16),) and encoder.hidden_sizes == (32 + 24,) == (encoder.facts.pooled_size,)
    assert features.class_tokens[0].shape[1] == features.registers[0].shape[1] == 0


def test_towers_and_layer_fusions_nest_and_save(tmp_path):
    """A layer fusion over a tower, one of whose encoders is a layer fusion, in a tower with another ViT."""
    fusing = LayerFusionModel(LayerFusionConfig(encoder_config={"model_type": "vit", **VIT}, layers=[1, 3]))
    inner = MultiEncoderModel.from_encoders([fusing, build("vit")], image_size=32)
    over = LayerFusionModel.from_encoder(inner, fusion_type="film")
    model = MultiEncoderModel.from_encoders([over, build("clip_vision_model")], image_size=32).eval()
    assert model.config.fused_size == 3 * 32 and model.config.fused_grid == (4, 4)
    model.save_pretrained(tmp_path)
    loaded, info = MultiEncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixel_values = images("vit", size=(32, 32))
    expected, got = model(pixel_values), loaded.eval()(pixel_values)
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(got.last_hidden_state[..., :32], fusing.eval()(pixel_values).last_hidden_state[:, 1:])
    got.last_hidden_state.square().sum().backward()
    deep = "encoder_0.model.encoder.model.encoder_0.model.encoder.model."  # the ViT in the fusion in the tower
    gradients = [parameter.grad for name, parameter in loaded.named_parameters() if name.startswith(deep + "layers.")]
    assert len(gradients) > 30 and all(gradient.any() for gradient in gradients)


@torch.no_grad()
def test_a_nested_tower_compiles_to_one_graph_and_runs_in_half_precision():
    encoder, pixel_values = VisionEncoder(tower()), torch.randn(2, 3, 64, 64)
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")(pixel_values)
    torch.testing.assert_close(compiled.patches, encoder(pixel_values).patches)
    half = encoder.to(torch.bfloat16)(pixel_values)
    assert half.patches[0].dtype == half.pooled.dtype == torch.bfloat16


def test_what_a_tower_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"keeps a grid, got 'sequence_concat', whose 32 tokens have none"):
        encoder_facts(tower(fusion_type="sequence_concat", hidden_size=32).config)
    encoder = VisionEncoder(tower())
    with pytest.raises(ValueError, match="expected no `after` for MultiEncoderModel"):
        encoder(torch.randn(1, 3, 64, 64), after={1: lambda patches: patches})
    with pytest.raises(ValueError, match="expected 3 image channels, got 4"):
        encoder(torch.randn(1, 4, 64, 64))

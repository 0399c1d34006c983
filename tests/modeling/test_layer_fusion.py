import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    ViTConfig,
    ViTModel,
)

from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig
from vitweave.modeling.layer_fusion.registry import LAYER_FUSIONS
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.modeling_layer_fusion import (
    LayerFusionBackbone,
    LayerFusionForImageClassification,
    LayerFusionModel,
)
from vitweave.modeling.own_models import build_model

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
HOSTS = {
    "vit": (ViTModel, ViTConfig),
    "dinov2": (Dinov2Model, Dinov2Config),
    "clip": (CLIPVisionModel, CLIPVisionConfig),
    "siglip": (SiglipVisionModel, SiglipVisionConfig),
}
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def host(kind: str):
    model_class, config_class = HOSTS[kind]
    options = {name: value for name, value in TINY.items() if kind != "dinov2" or name != "intermediate_size"}
    return model_class(config_class(**options)).eval()


def specialised() -> dict:
    options = {name: value for name, value in TINY.items() if name != "intermediate_size"}
    return {"model_type": "specialized_vit", "mlp_ratio": 2, "use_mask_token": False, **options}


@pytest.mark.parametrize("fusion_type", sorted(LAYER_FUSIONS))
@pytest.mark.parametrize("kind", HOSTS)
def test_fusing_a_pretrained_encoder_changes_nothing_at_first(kind, fusion_type):
    encoder = host(kind)
    expected = encoder(PIXELS)
    fused = LayerFusionModel.from_encoder(encoder, fusion_type=fusion_type).eval()(PIXELS)
    assert torch.equal(fused.pooler_output, expected.pooler_output)
    assert torch.equal(fused.last_hidden_state[:, 1:], expected.last_hidden_state[:, 1:])


def test_saves_and_loads_the_layers_and_the_weights(tmp_path):
    config = LayerFusionConfig(encoder_config=specialised(), layers=[1, -1], fusion_type="concat", num_labels=3)
    model = LayerFusionForImageClassification(config).eval()
    with torch.no_grad():
        model.layer_fusion.fusion.gamma_global.fill_(0.3)
    model.save_pretrained(tmp_path)
    loaded = LayerFusionForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.layers == [1, 4]
    assert torch.equal(loaded(PIXELS).logits, model(PIXELS).logits)
    base = LayerFusionModel.from_pretrained(tmp_path)
    assert torch.equal(base(PIXELS).pooler_output, model.layer_fusion(PIXELS).pooler_output)


def test_presets_and_layers_outside_the_encoder():
    def layers(value, **changes):
        return LayerFusionConfig(encoder_config=specialised() | changes, layers=value).layers

    assert layers("quarters", num_hidden_layers=12) == [3, 6, 9, 12]
    assert layers("quarters", num_hidden_layers=3) == [1, 2, 3]
    assert layers("thirds", num_hidden_layers=12) == [4, 8, 12]
    assert layers("last4", num_hidden_layers=6) == [3, 4, 5, 6]
    assert layers("all") == [1, 2, 3, 4]
    assert layers([-1, 0]) == [0, 4]
    with pytest.raises(ValueError, match="layers"):
        layers([5])
    with pytest.raises(ValueError, match="unknown layer preset 'quaters'"):
        layers("quaters")
    with pytest.raises(ValueError):
        layers("clip_3_18_23")


def test_no_block_state_is_kept_that_the_fusion_does_not_read():
    model = LayerFusionModel(LayerFusionConfig(encoder_config=specialised(), layers=[2], fusion_type="weighted_sum"))
    assert model.encoder.layers == (2, 4)
    features = model.encoder(PIXELS)
    assert len(features.patches) == 2
    tokens = model.layer_tokens(features)
    assert tokens.patches is None and tokens.cls.shape == (2, 1, 32)


def test_a_hierarchical_encoder_is_refused_with_the_reason():
    swin = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    with pytest.raises(ValueError, match="one width and one grid"):
        LayerFusionModel(LayerFusionConfig(encoder_config=swin, layers=[1, 2]))


def test_hidden_states_are_the_encoders_and_can_be_chosen():
    encoder = host("dinov2")
    model = LayerFusionModel.from_encoder(encoder, layers=[2]).eval()
    expected = encoder(PIXELS, output_hidden_states=True).hidden_states
    found = model(PIXELS, output_hidden_states=True)
    assert len(found.hidden_states) == 5
    for state, wanted in zip(found.hidden_states, expected, strict=True):
        torch.testing.assert_close(state, wanted)
    chosen = model(PIXELS, output_hidden_states=[0, -1]).hidden_states
    assert [state is None for state in chosen] == [False, True, True, True, False]
    assert model(PIXELS, output_hidden_states=0).hidden_states[0] is not None
    assert torch.equal(found.pooler_output, model(PIXELS).pooler_output)


def test_masked_patches_change_nothing_and_a_wrong_mask_is_refused():
    torch.manual_seed(0)
    config = LayerFusionConfig(encoder_config=specialised(), fusion_type="film")
    model = LayerFusionModel(config).eval()
    with torch.no_grad():
        model.fusion.gamma_global.fill_(1.0)
    mask = torch.ones(2, 16, dtype=torch.bool)
    torch.testing.assert_close(model(PIXELS, patch_mask=mask).pooler_output, model(PIXELS).pooler_output)
    mask[:, :4] = False
    assert not torch.allclose(model(PIXELS, patch_mask=mask).pooler_output, model(PIXELS).pooler_output, atol=1e-4)
    with pytest.raises(ValueError, match="4x4=16 patches"):
        model(PIXELS, patch_mask=mask[:, :5])


def test_training_reaches_the_fusion_and_the_encoder():
    torch.manual_seed(0)
    config = LayerFusionConfig(encoder_config=specialised(), num_labels=3)
    model = LayerFusionForImageClassification(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(PIXELS, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_the_backbone_gives_the_fused_patches_as_a_map(tmp_path):
    config = LayerFusionConfig(encoder_config=specialised(), fusion_type="film")
    model = LayerFusionModel(config).eval()
    with torch.no_grad():
        model.fusion.gamma_patch.fill_(0.5)
    model.save_pretrained(tmp_path)
    backbone = LayerFusionBackbone.from_pretrained(tmp_path, out_indices=[0])
    assert (backbone.channels, backbone.out_features) == ([32], ["map1"])
    (feature_map,) = backbone(PIXELS).feature_maps
    patches = feature_map.flatten(2).transpose(1, 2)
    assert torch.equal(patches, model(PIXELS).last_hidden_state[:, 1:])
    segmenter = DensePredictorForSemanticSegmentation.from_backbone(backbone, num_labels=3)
    assert segmenter(PIXELS).logits.shape == (2, 3, 32, 32)
    segmenter.save_pretrained(tmp_path / "segmenter")
    loaded = DensePredictorForSemanticSegmentation.from_pretrained(tmp_path / "segmenter")
    assert torch.equal(loaded(PIXELS).logits, segmenter.eval()(PIXELS).logits)


def test_a_backbone_needs_a_fusion_of_patches_and_maps_that_exist():
    with pytest.raises(ValueError, match="'concat' with the options None fuses no patches"):
        LayerFusionBackbone(LayerFusionConfig(encoder_config=specialised(), fusion_type="concat"))
    config = LayerFusionConfig(encoder_config=specialised(), fusion_type="film", out_features=["map2"])
    with pytest.raises(ValueError, match="map2"):
        LayerFusionBackbone(config)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [(8, 8), (4, 4), (2, 2)]),
        ({"style": "last", "extra_level": True}, [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]),
    ],
    ids=["fpn", "last"],
)
def test_a_pyramid_is_a_backbone(options, sizes):
    options = {"out_channels": 8, **options}
    config = LayerFusionConfig(encoder_config=specialised(), fusion_type="fpn", fusion_options=options)
    backbone = LayerFusionBackbone(config).eval()
    assert backbone.channels == [8] * len(sizes)
    assert [tuple(feature_map.shape[-2:]) for feature_map in backbone(PIXELS).feature_maps] == sizes
    segmenter = DensePredictorForSemanticSegmentation.from_backbone(backbone, num_labels=3)
    assert segmenter(PIXELS).logits.shape == (2, 3, 32, 32)


def test_rates_beyond_the_grid_are_told_when_the_model_is_built(recwarn):
    def build(rates):
        options = {"rates": rates}
        LayerFusionModel(LayerFusionConfig(encoder_config=specialised(), fusion_type="aspp", fusion_options=options))

    build([1, 3])
    assert not [w for w in recwarn if "ASPP" in str(w.message)]
    with pytest.warns(UserWarning, match=r"rates \[4, 6\] reach beyond a grid of 4x4 .* largest useful rate is 3"):
        build([2, 4, 6])


def test_the_encoder_alone_can_be_built_from_its_config():
    config = LayerFusionConfig(encoder_config=specialised())
    assert (config.hidden_size, config.num_channels) == (32, 3)
    assert build_model(config.encoder_config).config.hidden_size == 32


@pytest.mark.parametrize("fusion_type", sorted(LAYER_FUSIONS))
def test_kept_features_give_what_the_images_give(fusion_type):
    options = {"direct": True}  # so that the fusion counts
    config = LayerFusionConfig(
        encoder_config=specialised(), layers=[1, 2], fusion_type=fusion_type, fusion_options=options
    )
    torch.manual_seed(0)
    model = LayerFusionModel(config).eval()
    patches = model(PIXELS).last_hidden_state.shape[1] - model.encoder.facts.num_class_tokens
    mask = torch.ones(2, patches, dtype=torch.bool)
    mask[0, -2:] = False
    with torch.no_grad():
        expected = model(PIXELS, patch_mask=mask)
        for needs in (None, {"patches", "patch_means"}):  # what it reads, and what any fusion reads
            kept = model.encode(PIXELS, mask, needs)
            found = model(encoder_outputs=kept)
            assert torch.equal(found.pooler_output, expected.pooler_output)
            rows = found.last_hidden_state.shape[1]
            assert torch.equal(found.last_hidden_state, expected.last_hidden_state[:, :rows])
            assert (rows > 1) == ("base_patches" in kept)
    needed = "patches" if "patches" in model.fusion.needs else "cls"
    with pytest.raises(ValueError, match=f"expected .*'{needed}'.* in encoder_outputs"):
        model(encoder_outputs={name: part for name, part in kept.items() if name != needed})


def test_a_classifier_reads_kept_features_too():
    config = LayerFusionConfig(encoder_config=specialised(), layers=[1, 2], fusion_type="concat", num_labels=3)
    model = LayerFusionForImageClassification(config).eval()
    kept = model.encode(PIXELS)
    assert "patches" not in kept and model.encode_options["layers"] == (1, 2)
    assert torch.equal(model(encoder_outputs=kept).logits, model(PIXELS).logits)


def test_a_classifier_takes_over_a_loaded_encoder(tmp_path):
    encoder = host("vit")
    labels = {0: "cat", 1: "dog", 2: "owl"}
    options = {"layers": [2, 4], "fusion_type": "concat", "fusion_options": {"direct": True}}
    model = LayerFusionForImageClassification.from_encoder(encoder, id2label=labels, **options).eval()
    assert model.config.id2label == labels and model.classifier.out_features == 3
    for name, weight in encoder.state_dict().items():
        assert torch.equal(model.vision_encoder.state_dict()[name], weight), name
    model.save_pretrained(tmp_path)
    loaded = LayerFusionForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(PIXELS).logits, model(PIXELS).logits, rtol=0, atol=0)

"""Several encoders in one tower: what each sees, what is kept and frozen, and towers inside of towers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_encoders import CASES
from transformers import AutoBackbone, AutoConfig, AutoModel, Dinov2Config, Dinov2Model
from transformers.utils.import_utils import is_timm_available

from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig
from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.multi_encoder_presets import PRESETS, multi_encoder_preset
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.modeling_multi_encoder import (
    MultiEncoderBackbone,
    MultiEncoderForImageClassification,
    MultiEncoderModel,
)

DINO, CONVNEXT = {"model_type": "dinov2", **CASES["dinov2"]}, {"model_type": "convnext", **CASES["convnext"]}
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

# tokens and width of SPEC tables: name -> (tokens, channels in front of the projector)
PUBLISHED = {
    "cambrian": (576, 1024),
    "eagle-x4": (1024, 6656),
    "eagle-x5": (1024, 7680),
    "internvl": (256, 4096),
    "leo": (512, 4096),
    "llava-hr": (1024, 1024),
    "llava-hr-x": (1024, 1024),
    "mgm": (576, 1024),
    "mgm-hd": (2880, 1024),
}


def tower_config(**changes) -> MultiEncoderConfig:
    options = {"encoder_configs": [DINO, CONVNEXT], "encoder_options": [{}, {"image_size": 128}], "image_size": 32}
    return MultiEncoderConfig(**options | changes)


def tower(model_class=MultiEncoderModel, **changes):
    torch.manual_seed(0)
    return model_class(tower_config(**changes)).eval()


@pytest.mark.parametrize("name", PRESETS)
def test_full_size_presets_have_the_published_tokens(name):
    config = multi_encoder_preset(name)
    assert (config.num_tokens, config.fused_size) == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_tiny_presets_run_and_keep_their_structure(name):
    torch.manual_seed(0)
    tiny, full = multi_encoder_preset(name, tiny=True), multi_encoder_preset(name)
    assert len(tiny.encoder_configs) == len(full.encoder_configs) and tiny.fusion_type == full.fusion_type
    model = MultiEncoderModel(tiny).eval()
    with torch.no_grad():
        tokens = model(torch.rand(1, 3, tiny.image_size, tiny.image_size)).last_hidden_state
    assert tokens.shape == (1, tiny.num_tokens, tiny.fused_size)


@pytest.mark.parametrize(
    ("side", "fast", "tokens"), [(384, 336, 576), (768, 336, 576), (1024, 448, 1024), (1536, 672, 2304)]
)
def test_llava_hr_at_its_published_sizes(side, fast, tokens):
    options = multi_encoder_preset("llava-hr").encoder_options
    config = multi_encoder_preset(
        "llava-hr", image_size=side, encoder_options=[{**options[0], "image_size": fast}, options[1]]
    )
    assert config.num_tokens == tokens


def test_sizes_that_do_not_fit_are_refused_by_the_config():
    options = multi_encoder_preset("llava-hr").encoder_options
    fast = {**options[0], "image_size": 336}
    with pytest.raises(ValueError, match="16x16"):
        multi_encoder_preset("llava-hr", image_size=512, encoder_options=[fast, options[1]])
    with pytest.raises(ValueError, match="whole patches of 8x8"):
        tower_config(image_size=36)
    with pytest.raises(ValueError, match="unshuffling by 3"):
        tower_config(encoder_options=[{"unshuffle": {"factor": 3, "order": "a"}}, {}], image_size=32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_options": [{"image_sise": 3}, {}]}, "no option.*image_sise"),
        ({"encoder_options": [{}]}, "one entry of encoder_options per encoder, 2, got 1"),
        ({"encoder_configs": []}, "at least one encoder"),
        ({"fusion_type": "chanel_concat"}, "unknown fusion_type"),
        ({"encoder_options": [{"resize": "nearest"}, {}]}, "expected resize to be one of"),
        ({"encoder_options": [{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}, {}]}, "the tower must know"),
        ({"encoder_options": [{"image_mean": [0, 0, 0]}, {}]}, "both image_mean and image_std"),
    ],
)
def test_misspelt_and_missing_options_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        tower_config(**changes)


def test_kept_class_tokens_need_a_fusion_that_reads_them():
    with pytest.raises(ValueError, match="reads maps only"):
        tower(encoder_options=[{"class_token": "keep"}, {}])


def test_every_encoder_sees_its_own_size_and_normalisation():
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.2, 0.3]
    options = [{}, {"image_size": 128, "image_mean": mean, "image_std": std, "resize": "bilinear_ac"}]
    model = tower(encoder_options=options, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    seen = []
    model.encoder_1.model.register_forward_pre_hook(lambda module, args: seen.append(args))
    resized = torch.nn.functional.interpolate(PIXELS, size=(128, 128), mode="bilinear", align_corners=True)
    expected = (resized * 0.5 + 0.5 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    images = model.renormalised(model.resized(PIXELS, model.config.options[1]), model.config.options[1])
    torch.testing.assert_close(images, expected)
    found = model.read(PIXELS).maps[1]
    torch.testing.assert_close(found, model.encoder_1(expected).feature_maps[0])


def test_several_layers_meet_on_the_grid_of_the_first():
    model = tower(encoder_options=[{}, {"image_size": 128, "layer": [1, 2, 3, 4]}])
    maps = model.encoder_1(model.resized(PIXELS, model.config.options[1])).feature_maps
    found = model.read(PIXELS).maps[1]
    assert found.shape == (2, sum(CASES["convnext"]["hidden_sizes"]), 32, 32)
    assert torch.equal(found[:, :8], maps[0])


def test_another_image_size_reaches_every_encoder_in_proportion():
    model = tower(fusion_type="add")
    wide = torch.randn(1, 3, 32, 64)
    assert model(wide).last_hidden_state.shape[1] == 4 * 8
    assert model.config.plan_for((32, 64)).grid == (4, 8)


def test_frozen_encoders_stay_as_they_are_and_adapters_in_them_train(tmp_path):
    model = tower(MultiEncoderForImageClassification, encoder_options=[{"frozen": True}, {"image_size": 128}])
    model.save_pretrained(tmp_path)
    for frozen in (model, MultiEncoderForImageClassification.from_pretrained(tmp_path)):
        frozen.train()
        inner = frozen.multi_encoder
        assert not any(weight.requires_grad for weight in inner.encoder_0.parameters())
        assert not inner.encoder_0.model.training and inner.encoder_1.model.training
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*encoder_0.*(query|value|q_proj|v_proj)")).train()
    assert adapted.base_model.model.multi_encoder.encoder_0.model.training


def test_what_is_kept_of_the_encoders_trains_like_the_images():
    kept = tower(MultiEncoderForImageClassification, fusion_type="deformable", fusion_options={"num_heads": 4})
    labels = torch.tensor([0, 1])
    losses = [kept(PIXELS, labels).loss, kept(encoder_outputs=kept.encode(PIXELS), labels=labels).loss]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match="another tower"):
        kept(encoder_outputs={"maps": kept.encode(PIXELS)["maps"][:1]})
    with pytest.raises(ValueError, match="got both"):
        kept(PIXELS, encoder_outputs=kept.encode(PIXELS))


def test_injected_features_cannot_be_kept():
    mixed = {"fusion_type": "mixture_of_resolution"}
    with pytest.raises(ValueError, match="adapter_layers"):
        tower(**mixed).encode(PIXELS)
    tower(**mixed, fusion_options={"adapter_layers": []}).encode(PIXELS)


def test_fresh_adapters_leave_the_low_resolution_path_as_it_is_bit_for_bit():
    model = tower(fusion_type="mixture_of_resolution")
    assert model.config.fusion_options["adapter_layers"] == [1, 2]  # of three blocks
    alone = model.encoder_0(PIXELS).feature_maps[0]
    assert torch.equal(model.read(PIXELS).maps[0], alone)


def test_loaded_encoders_keep_their_weights():
    torch.manual_seed(0)
    encoder = Dinov2Model(Dinov2Config(**CASES["dinov2"]))
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    model = MultiEncoderModel.from_encoders([encoder, encoder], image_size=32, fusion_type="add")
    assert model.encoder_0.model is encoder
    assert all(torch.equal(weight, before[name]) for name, weight in encoder.state_dict().items())


def test_towers_nest_and_load_by_the_auto_classes(tmp_path):
    """Layer fusion over a specialised ViT inside a tower inside a tower."""
    fusion = LayerFusionConfig(
        encoder_config={"model_type": "specialized_vit", **CASES["specialized_vit"]},
        layers=[1, 3],
        fusion_type="concat",
        fusion_options={"dense": True},
    )
    inner = tower_config(encoder_configs=[fusion, DINO], encoder_options=None)
    torch.manual_seed(0)
    outer = MultiEncoderModel(tower_config(encoder_configs=[inner, CONVNEXT])).eval()
    outer.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is MultiEncoderModel and AutoConfig.from_pretrained(tmp_path).fused_size == 96
    assert torch.equal(loaded(PIXELS).last_hidden_state, outer(PIXELS).last_hidden_state)
    assert isinstance(AutoBackbone.from_config(outer.config), MultiEncoderBackbone)


def test_under_a_dense_head_only_fusion_and_head_train():
    config = DensePredictorConfig(
        backbone_config=tower_config(fusion_type="add"), num_labels=3, freeze_backbone=True, head_type="linear"
    )
    torch.manual_seed(0)
    model = DensePredictorForSemanticSegmentation(config).eval()
    trained = {name.split(".")[1] for name, weight in model.named_parameters() if weight.requires_grad}
    assert "fusion" in trained and not any("encoder_" in name for name in trained)
    labels = torch.randint(0, 3, (2, 32, 32))
    assert torch.equal(model(PIXELS, labels).loss, model(encoder_outputs=model.encode(PIXELS), labels=labels).loss)


def test_attention_is_chosen_per_encoder():
    config = tower_config(encoder_configs=[DINO, DINO], encoder_options=None)
    config._attn_implementation = {"encoder_0": "eager", "encoder_1": "sdpa"}
    model = MultiEncoderModel(config)
    found = [encoder.config._attn_implementation for encoder in model.encoders]
    assert found == ["eager", "sdpa"]


@pytest.mark.skipif(not is_timm_available(), reason="needs timm")
def test_what_the_options_say_of_a_timm_encoder_is_checked():
    timm = {
        "model_type": "timm_wrapper",
        "architecture": "convnext_atto",
        "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    }
    options = {"image_size": 128, "final_norm": False}
    model = tower(encoder_configs=[DINO, timm], encoder_options=[{}, {**options, "channels": 32, "stride": 32}])
    assert model(PIXELS).last_hidden_state.shape == (2, 16, 64)
    with pytest.raises(ValueError, match="have 32 channels"):
        tower(encoder_configs=[DINO, timm], encoder_options=[{}, {**options, "channels": 48, "stride": 32}])
    with pytest.raises(ValueError, match="does not tell its channels"):
        tower_config(encoder_configs=[DINO, timm], encoder_options=[{}, options])

"""The fusions that need nothing but maps, behind real encoders: a ViT and a convolutional one."""

import pytest
import torch
from model_checks import check_saved_and_loaded_equal
from tiny_encoders import CASES

from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.modeling.modeling_multi_encoder import MultiEncoderBackbone, MultiEncoderModel
from vitweave.modeling.tokens import tokens_to_map

ENCODERS = [{"model_type": "dinov2", **CASES["dinov2"]}, {"model_type": "convnext", **CASES["convnext"]}]
TOWERS = [
    ("sequence_concat", {}, None, [{}, {"image_size": [128, 192]}], 48),
    (
        "sequence_concat",
        {"order": "append"},
        48,
        [{"class_token": "keep"}, {"image_size": [64, 96]}],
        31,
    ),
    ("channel_concat", {"grid": [2, 3]}, None, None, 6),
    ("add", {}, None, None, 24),
    ("deformable", {"num_heads": 4}, None, None, 24),
]
every_tower = pytest.mark.parametrize(
    ("name", "options", "hidden_size", "encoder_options", "tokens"), TOWERS, ids=[f"{t[0]}-{t[-1]}" for t in TOWERS]
)
PIXELS = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def config_of(name, options, hidden_size=None, encoder_options=None) -> MultiEncoderConfig:
    return MultiEncoderConfig(
        encoder_configs=ENCODERS,
        encoder_options=encoder_options or [{}, {"image_size": [64, 96]}],
        image_size=[32, 48],
        fusion_type=name,
        fusion_options=options,
        hidden_size=hidden_size,
    )


@every_tower
def test_the_config_knows_what_the_model_returns(name, options, hidden_size, encoder_options, tokens, tmp_path):
    config = config_of(name, options, hidden_size, encoder_options)
    assert config.num_tokens == tokens
    model = MultiEncoderModel(config).eval()
    fused = model(PIXELS).last_hidden_state
    assert fused.shape == (2, config.num_tokens, config.fused_size)
    loaded = check_saved_and_loaded_equal(model, tmp_path).eval()
    assert torch.equal(loaded(PIXELS).last_hidden_state, fused)
    again = model(encoder_outputs=model.encode(PIXELS)).last_hidden_state
    assert torch.equal(again, fused)


@pytest.mark.parametrize("name", ["add", "deformable"])
def test_a_fresh_tower_is_its_first_encoder(name):
    model = MultiEncoderBackbone(config_of(name, {})).eval()
    alone = model.encoder_0.model(PIXELS).last_hidden_state[:, 1:]
    assert torch.equal(model(PIXELS).feature_maps[0], tokens_to_map(alone, (4, 6)))


def test_the_config_counts_the_class_tokens_and_registers_that_are_kept():
    registers = {"model_type": "dinov2_with_registers", **CASES["dinov2_with_registers"]}
    config = MultiEncoderConfig(
        encoder_configs=[*ENCODERS, registers],
        encoder_options=[{"class_token": "keep"}, {"image_size": [64, 96]}, {"class_token": "keep"}],
        image_size=[32, 48],
        fusion_type="sequence_concat",
        fusion_options={"order": "append"},
    )
    assert config.num_tokens == 1 + 24 + 6 + 3 + 24
    assert MultiEncoderModel(config)(PIXELS).last_hidden_state.shape == (2, 58, 32)
    assert MultiEncoderConfig.from_dict(config.to_dict()).num_tokens == 58
    with pytest.raises(ValueError, match=r"no class tokens with order='interleave'.* num_prefixes=\[1, 0\]"):
        config_of("sequence_concat", {}, None, [{"class_token": "keep"}, {"image_size": [128, 192]}])


def test_grids_that_do_not_pair_are_refused_by_the_config():
    with pytest.raises(ValueError, match=r"as many tokens of every encoder with order='interleave', got \[24, 6\]"):
        config_of("sequence_concat", {})

"""Swin streams: transformers' own features without a fusion, and the checks of every stream encoder."""

import pytest
import torch
from model_checks import check_saved_and_loaded_equal
from stream_checks import (
    check_absent_sensors,
    check_checkpointing,
    check_compiled,
    check_every_weight_learns,
    check_exchange_is_recorded,
    check_exported,
    check_half_precision,
    check_sensors_meet,
    check_single_images,
    disturb,
    images,
    streams_with,
)
from transformers import SwinBackbone, SwinConfig, SwinModel

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.modality_streams.swin import SwinStreams
from vitweave.modeling.modality_streams.windows import resize_bias_table
from vitweave.modeling.modeling_modality_fusion import ModalityFusionForSemanticSegmentation, ModalityFusionModel

SIZES = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64}
FUSIONS = ["cross_attention", "gemini", "rectify_fuse", "token_exchange"]
IDLE = ("k_proj.bias", "key_bias")  # shifts all scores alike
every_fusion = pytest.mark.parametrize("fusion", FUSIONS)


def swin(**changes) -> SwinConfig:
    return SwinConfig(**{**SIZES, **changes})


def host_and_streams(host_class, config: SwinConfig, **options) -> tuple:
    torch.manual_seed(0)
    host = host_class(config).eval()
    disturb(host)
    # 1e-5 is transformers' epsilon in the norms that are ours per modality
    config = ModalityFusionConfig(stream_config=host.config, fusion_type=None, layer_norm_eps=1e-5, **options)
    streams = SwinStreams(config).eval()
    streams.load_encoder(host)
    return host, streams


@pytest.mark.parametrize(
    ("size", "positions"),  # whole windows, padded windows, padded patches; positions are for the size they have
    [((64, 64), False), ((72, 100), False), ((65, 90), False), ((64, 64), True)],
)
def test_without_a_fusion_every_stream_is_the_swin(size, positions):
    config = swin(out_features=["stage1", "stage2"], use_absolute_embeddings=positions)
    host, streams = host_and_streams(SwinBackbone, config)
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = streams(pixels[:, None].expand(-1, 2, -1, -1, -1)).maps
        for stage_map, expected in zip(maps, host(pixels).feature_maps, strict=True):
            for modality in range(2):
                torch.testing.assert_close(stage_map[modality], expected, atol=3e-6, rtol=1e-5)


def test_a_base_model_gives_the_norm_of_its_last_stage(tmp_path):
    host, streams = host_and_streams(SwinModel, swin())
    pixels = images(size=(64, 64))
    host.save_pretrained(tmp_path)
    model = ModalityFusionModel.from_encoder(str(tmp_path), fusion_type=None, layer_norm_eps=1e-5).eval()
    with torch.no_grad():
        tokens = streams(pixels).tokens
        for modality in range(2):
            expected = host(pixels[:, modality]).last_hidden_state
            torch.testing.assert_close(tokens[modality], expected, atol=3e-6, rtol=1e-5)
        torch.testing.assert_close(model(pixels).last_hidden_state, tokens.mean(dim=0), atol=3e-6, rtol=1e-5)
    assert bool((streams.stages[0].layer_norm.weight == 1).all())


def test_windows_keep_size_and_shift_on_small_maps():
    """transformers' model drops the shift where a window holds the whole map; its backbone and ours keep it."""
    pixels = torch.randn(1, 3, 16, 16)  # a map of 4 x 4, one window
    config = swin(depths=[2], num_heads=[2], out_features=["stage1"])
    with torch.no_grad():
        backbone, streams = host_and_streams(SwinBackbone, config)
        ours = streams(pixels[:, None].expand(-1, 2, -1, -1, -1)).maps[0][0]
        torch.testing.assert_close(ours, backbone(pixels).feature_maps[0], atol=3e-6, rtol=1e-5)
        model, streams = host_and_streams(SwinModel, config)
        ours = streams(pixels[:, None].expand(-1, 2, -1, -1, -1)).tokens[0]
        assert not torch.allclose(ours, model(pixels).last_hidden_state, atol=1e-3)
    assert streams(images(size=(12, 8))).maps[0].shape == (2, 2, 32, 3, 2)


def test_tables_of_another_window_are_resampled():
    torch.manual_seed(0)
    host = SwinModel(swin(window_size=4))
    disturb(host)
    streams = SwinStreams(ModalityFusionConfig(stream_config=swin(window_size=6), fusion_type=None))
    streams.load_encoder(host)
    table = host.state_dict()["encoder.layers.0.blocks.0.attention.relative_position_bias.relative_position_bias_table"]
    found = streams.stages[0].blocks[0].attention.relative_position_bias.relative_position_bias_table
    assert found.shape == (121, 2) and torch.equal(found, resize_bias_table(table, 121))
    centre, old = found.unflatten(0, (11, 11))[5, 5], table.unflatten(0, (7, 7))[3, 3]
    torch.testing.assert_close(centre, old)  # bicubic keeps what lies on the same place


@every_fusion
def test_absent_sensors_are_not_read(fusion):
    check_absent_sensors(streams_with(swin(), fusion), images())


@every_fusion
def test_sensors_meet(fusion):
    check_sensors_meet(streams_with(swin(), fusion), images())


def test_three_sensors():
    check_absent_sensors(streams_with(swin(), "gemini", modalities=3), images(modalities=3))
    merged = streams_with(swin(), "gemini", modalities=3, auxiliary="max")
    assert [tuple(m.shape) for m in merged(images(modalities=3)).maps] == [(2, 2, 32, 8, 12), (2, 2, 64, 4, 6)]
    check_absent_sensors(merged, images(modalities=3))


def test_every_weight_learns():
    check_every_weight_learns(streams_with(swin(), "gemini"), images(), IDLE)
    check_every_weight_learns(streams_with(swin(), "token_exchange"), images(), IDLE)


def test_single_images():
    check_single_images(streams_with(swin(), "gemini"), images(size=(40, 56)))


@pytest.mark.slow
def test_compiled_and_exported():
    check_compiled(streams_with(swin(), "token_exchange"), images())
    check_exported(streams_with(swin(), "gemini"), images(size=(40, 56)), images(batch=3, size=(40, 56), seed=1))


def test_half_precision_and_checkpointing():
    check_half_precision(streams_with(swin(), "gemini"), images())
    check_checkpointing(streams_with(swin(), "token_exchange"), images())


def test_only_the_last_blocks_fuse_and_fewer_stages_run():
    streams = streams_with(swin(), "token_exchange", fusion_blocks=3, drop_path_rate=0.3)
    check_exchange_is_recorded(streams, images(), {"stage1.block1", "stage2.block0", "stage2.block1"})
    rates = [block.drop_path.rate for stage in streams.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert len(streams(images(), num_stages=1).maps) == 1


def test_saved_and_loaded(tmp_path):
    config = ModalityFusionConfig(stream_config=swin(use_absolute_embeddings=True), fusion_type="gemini")
    model = ModalityFusionForSemanticSegmentation(config).eval()
    tables = [t for name, t in model.state_dict().items() if name.endswith(("bias_table", "position_embeddings"))]
    assert len(tables) == 5 and all(0.01 < table.std() < 0.03 for table in tables)
    check_saved_and_loaded_equal(model, tmp_path)


def test_norms_that_are_shared_cannot_be_compared():
    with pytest.raises(ValueError, match="a Swin's blocks share theirs"):
        streams_with(swin(), "channel_exchange")
    with pytest.raises(ValueError, match="do not fit"):
        streams_with(swin(), None).load_encoder(SwinModel(swin(depths=[2, 3])))

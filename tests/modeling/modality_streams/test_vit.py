"""Plain ViTs as streams: vanilla ones give their own hidden states, and every kind fuses."""

import pytest
import torch
import torch.nn.functional as F
from model_checks import check_saved_and_loaded_equal
from stream_checks import (
    ACTIVE,
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
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    SiglipVisionConfig,
)
from vanilla_hosts import BASE_HOSTS, MLP, SHAPE

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modality_streams.vit import VitStreams, vit_of_streams
from vitweave.modeling.modeling_modality_fusion import ModalityFusionForSemanticSegmentation, ModalityFusionModel
from vitweave.modeling.modeling_specialized_vit import SpecializedViTForImageClassification, SpecializedViTModel

SPECIALIZED = {"norm_blocks": "all", "qkv_blocks": 2, "proj_blocks": 1, "mlp_blocks": 1, "specialize_final_norm": True}
STREAMS = {
    "dinov2": lambda: Dinov2Config(**SHAPE),
    "clip": lambda: CLIPVisionConfig(**SHAPE, **MLP),
    "dinov3": lambda: DINOv3ViTConfig(**SHAPE, **MLP, num_register_tokens=2),
    "swiglu registers": lambda: Dinov2WithRegistersConfig(**SHAPE, use_swiglu_ffn=True, num_register_tokens=2),
    "specialized": lambda: SpecializedViTConfig(**SHAPE, **SPECIALIZED),
    "relative": lambda: SpecializedViTConfig(**SHAPE, relative_position_bias="shared", attention_bias="kv", cls_rank=2),
}
# by construction: the bias of keys shifts all scores alike; the class tokens of the last block reach no map
IDLE = ("k_proj.bias", "k_proj_cls.bias", "key_bias")
CLS_AT_THE_END = ("layernorm_cls.weight", "layernorm_cls.bias")
every_stream = pytest.mark.parametrize("kind", sorted(STREAMS))
every_fusion = pytest.mark.parametrize("fusion", sorted(ACTIVE))


def normed(streams: VitStreams, stage: int, hidden: torch.Tensor) -> torch.Tensor:
    norm = streams.stages[stage].layernorm
    return F.layer_norm(hidden, hidden.shape[-1:], norm.weight[0], norm.bias[0], norm.eps)


@pytest.mark.parametrize("family", sorted(BASE_HOSTS))
def test_without_a_fusion_every_stream_is_the_vit(family):
    torch.manual_seed(0)
    host = BASE_HOSTS[family]().eval()
    disturb(host)
    config = ModalityFusionConfig(stream_config=host.config, fusion_type=None, stage_layers=[1, 3])
    streams = VitStreams(config).eval()
    streams.load_encoder(host)
    pixels = torch.randn(2, 3, 32, 32)
    # MAE leaves patches out and shuffles the rest; its specialised form sees all in order
    reference = SpecializedViTModel.from_vit(host).eval() if family == "vit_mae" else host
    with torch.no_grad():
        output = streams(pixels[:, None].expand(-1, 2, -1, -1, -1))
        states = reference(pixels, output_hidden_states=True).hidden_states
        for stage, layer in enumerate(config.stage_layers):
            patches = normed(streams, stage, states[layer])[:, streams.vit.num_prefix_tokens :]
            expected = patches.transpose(1, 2).unflatten(2, (4, 4))
            for modality in range(2):
                torch.testing.assert_close(output.maps[stage][modality], expected, atol=2e-6, rtol=1e-5)
        for modality in range(2):
            torch.testing.assert_close(output.tokens[modality], normed(streams, 1, states[3]), atol=2e-6, rtol=1e-5)


def test_a_specialised_vit_keeps_its_twins():
    torch.manual_seed(0)
    vit = SpecializedViTModel(SpecializedViTConfig(**SHAPE, **SPECIALIZED)).eval()
    disturb(vit)
    streams = VitStreams(ModalityFusionConfig(stream_config=vit.config, fusion_type=None)).eval()
    streams.load_encoder(vit)
    pixels = images(size=(40, 24))
    with torch.no_grad():
        tokens = streams(pixels).tokens
        for modality in range(2):
            expected = vit(pixels[:, modality]).last_hidden_state
            torch.testing.assert_close(tokens[modality], expected, atol=2e-6, rtol=1e-5)
    assert streams.stages[0].blocks[0].norm1_cls.weight.shape == (2, 32)


def test_a_classifier_and_a_folder_give_their_encoder(tmp_path):
    torch.manual_seed(0)
    host = BASE_HOSTS["dinov2"]().eval()
    host.save_pretrained(tmp_path)
    from_folder = ModalityFusionModel.from_encoder(str(tmp_path), fusion_type=None)
    classifier = SpecializedViTForImageClassification.from_vit(host, num_labels=2)
    from_classifier = ModalityFusionModel.from_encoder(classifier, fusion_type=None)
    pixels = images()
    with torch.no_grad():
        one, other = (model.eval()(pixels).last_hidden_state for model in (from_folder, from_classifier))
    torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


@every_stream
def test_shapes_of_the_stages(kind):
    streams = streams_with(STREAMS[kind](), "gemini", stage_layers=[1, 2])
    output = streams(images(size=(32, 48)))
    assert [tuple(stage_map.shape) for stage_map in output.maps] == [(2, 2, 32, 4, 6)] * 2
    assert streams.channels == [32, 32] and streams.strides == [8, 8]
    assert output.tokens.shape == (2, 2, streams.vit.num_prefix_tokens + 24, 32)
    assert len(streams.stages[0].blocks) == len(streams.stages[1].blocks) == 1  # the third block would serve nobody
    assert len(streams(images(), num_stages=1).maps) == 1


@every_stream
def test_every_weight_learns(kind):
    streams = streams_with(STREAMS[kind](), "gemini")
    idle = IDLE
    last = len(streams.stages) - 1
    if kind in ("specialized", "relative"):  # what the last block does to the class token reaches no map
        block = f"stages.{last}.blocks.{len(streams.stages[last].blocks) - 1}."
        names = [name for name, _ in streams.named_parameters() if name.startswith(block) and "_cls" in name]
        idle += (*names, *CLS_AT_THE_END)
    check_every_weight_learns(streams, images(), idle)


@every_fusion
@pytest.mark.parametrize("kind", ["dinov2", "specialized"])
def test_absent_sensors_are_not_read(kind, fusion):
    check_absent_sensors(streams_with(STREAMS[kind](), fusion), images())


@every_fusion
def test_sensors_meet_in_the_blocks(fusion):
    check_sensors_meet(streams_with(STREAMS["dinov3"](), fusion), images())


@every_stream
def test_three_sensors(kind):
    check_absent_sensors(streams_with(STREAMS[kind](), "gemini", modalities=3), images(modalities=3))


@every_stream
def test_three_sensors_merged_into_two_streams(kind):
    streams = streams_with(STREAMS[kind](), "gemini", modalities=3, auxiliary="max")
    assert [stage_map.shape[0] for stage_map in streams(images(modalities=3)).maps] == [2] * 3
    check_absent_sensors(streams, images(modalities=3))


def test_swapped_sensors_and_norms_swap_the_streams():
    streams = streams_with(STREAMS["specialized"](), None)
    pixels = images()
    with torch.no_grad():
        maps = streams(pixels).maps[-1]
        for name, parameter in streams.named_parameters():
            if "norm" in name:
                parameter.copy_(parameter.flip(0))
        torch.testing.assert_close(streams(pixels.flip(1)).maps[-1], maps.flip(0))


@every_stream
def test_single_images(kind):
    check_single_images(streams_with(STREAMS[kind](), "gemini"), images(size=(24, 40)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dinov3", "relative", "specialized"])
def test_compiled_in_one_graph(kind):
    check_compiled(streams_with(STREAMS[kind](), "token_exchange"), images())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "specialized"])
def test_exported(kind):
    check_exported(streams_with(STREAMS[kind](), "gemini"), images(), images(batch=3, seed=1))


@every_stream
def test_half_precision(kind):
    check_half_precision(streams_with(STREAMS[kind](), "gemini"), images())


def test_gradient_checkpointing():
    check_checkpointing(streams_with(STREAMS["specialized"](), "token_exchange"), images())


def test_only_the_last_blocks_fuse():
    streams = streams_with(STREAMS["dinov2"](), "token_exchange", fusion_blocks=2, stage_layers=[2, 3])
    check_exchange_is_recorded(streams, images(), {"stage1.block1", "stage2.block0"})
    assert [name for name, part in streams.named_modules() if name.endswith("fusion") and part is not None]
    streams = streams_with(STREAMS["dinov2"](), "gemini", fusion_blocks=1, stage_layers=[2, 3])
    fusing = {name.partition(".fusion.")[0] for name, _ in streams.named_parameters() if ".fusion." in name}
    assert fusing == {"stages.1.blocks.0"}


def test_drop_path_rises_to_the_last_block_and_draws_per_sensor():
    streams = streams_with(STREAMS["dinov2"](), None, drop_path_rate=0.5)
    assert [block.drop_path.rate for stage in streams.stages for block in stage.blocks] == [0.0, 0.25, 0.5]
    torch.manual_seed(0)
    same = images(batch=8)[:, :1].expand(-1, 2, -1, -1, -1)
    with torch.no_grad():
        for parameter in (p for name, p in streams.named_parameters() if "norm" in name):
            parameter.copy_(parameter[:1].expand_as(parameter))
        assert torch.equal(*streams(same).maps[-1])
        one, other = streams.train()(same).maps[-1]
    differ = (one != other).flatten(1).any(dim=1)
    assert differ.any()


def test_class_tokens_take_part_in_fusions_of_tokens():
    streams = streams_with(STREAMS["dinov2"](), "gemini")
    seen = []
    streams.stages[0].blocks[0].fusion.register_forward_hook(lambda module, args, output: seen.append(args))
    streams(images())
    tokens, inputs = seen[0]
    assert tokens.shape[2] == 1 + 24 and inputs.num_prefix_tokens == 1 and inputs.grid == (4, 6)


def test_attention_implementations_agree():
    torch.manual_seed(0)
    config = ModalityFusionConfig(stream_config=STREAMS["specialized"](), fusion_type=None, attn_implementation="eager")
    model = ModalityFusionModel(config).eval()
    disturb(model)
    with torch.no_grad():
        eager = model(images()).last_hidden_state
        model.set_attn_implementation("sdpa")
        fused = model(images()).last_hidden_state
    torch.testing.assert_close(fused, eager, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dinov2", "specialized"])
def test_the_config_of_the_streams_tells_their_attention(kind):
    config = ModalityFusionConfig(stream_config=STREAMS[kind](), fusion_type=None, attn_implementation="eager")
    model = ModalityFusionModel(config)
    assert model.config.stream_config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert model.config.stream_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["dinov2", "clip", "specialized", "relative"])
def test_saved_and_loaded(kind, tmp_path):
    config = ModalityFusionConfig(stream_config=STREAMS[kind](), fusion_type="gemini", fusion_options={"num_heads": 2})
    model = ModalityFusionForSemanticSegmentation(config).eval()
    disturb(model)
    loaded = check_saved_and_loaded_equal(model, tmp_path)
    assert loaded is None or loaded is not model


def test_a_new_vit_starts_as_a_vit_does():
    config = ModalityFusionConfig(stream_config=STREAMS["relative"](), fusion_type="gemini")
    state = ModalityFusionModel(config).streams.state_dict()
    assert 0.01 < state["embeddings.cls_token"].std() < 0.03
    assert state["embeddings.position_embeddings"].any()
    assert not state["stages.1.blocks.0.attention.q_proj.bias"].any()
    assert state["stages.1.blocks.0.attention.bias_k"].any()
    ups = [tensor for name, tensor in state.items() if name.endswith("_cls_up.weight")]
    assert ups and not any(up.any() for up in ups)


def test_facts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no class token"):
        streams_with(SiglipVisionConfig(**SHAPE, **MLP), None)
    with pytest.raises(ValueError, match="class_attention_layers"):
        streams_with(SpecializedViTConfig(**SHAPE, class_attention_layers=1), None)
    streams = streams_with(STREAMS["dinov2"](), None)
    with pytest.raises(ValueError, match="no place for"):
        streams.load_encoder(SpecializedViTModel(SpecializedViTConfig(**SHAPE)))
    with pytest.raises(ValueError, match="of the shape"):
        streams.load_encoder(Dinov2Model(Dinov2Config(**{**SHAPE, "hidden_size": 64})))


def test_the_config_stays_as_it_was():
    stream = SpecializedViTConfig(**SHAPE, use_pooler=True, drop_path_rate=0.3)
    config = ModalityFusionConfig(stream_config=stream, stage_layers=[1, 2], drop_path_rate=0.1)
    vit = vit_of_streams(config)
    assert (vit.use_pooler, vit.num_hidden_layers, vit.drop_path_rate) == (False, 2, 0.1)
    kept = config.stream_config
    assert (kept.use_pooler, kept.num_hidden_layers, kept.drop_path_rate) == (True, 3, 0.3)

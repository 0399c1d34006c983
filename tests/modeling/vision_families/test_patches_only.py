"""ViTs without their class token: as if their blocks were run by hand on the patches alone."""

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import CASES, VIT, build, images

from vitweave.configuration.encoder_configs import resolve_config
from vitweave.configuration.encoder_facts import CLASS_TOKEN_OPTIONAL, encoder_facts
from vitweave.modeling.vision_encoder import VisionEncoder
from vitweave.modeling.vision_families.registry import PATCHES_ONLY_FAMILIES, VISION_FAMILIES

every_type = pytest.mark.parametrize("name", CLASS_TOKEN_OPTIONAL)
SIZE = (32, 32)  # of the position tables


def without(name: str, **options) -> VisionEncoder:
    return VisionEncoder(build(name), class_token="drop_before", **options)


def by_hand(name: str, model, pixel_values: torch.Tensor) -> torch.Tensor:
    """The embeddings without their first tokens through the native blocks."""
    embeddings = model.embeddings
    options = {}
    if name == "vit_mae":  # natively, noise decides which patches are dropped: none, and in their order
        hidden_states = embeddings(pixel_values, noise=torch.arange(16.0).expand(len(pixel_values), -1))[0]
    else:
        hidden_states = embeddings(pixel_values)
    hidden_states = hidden_states[:, 2 if name == "deit" else 1 :]
    if name == "clip_vision_model":
        hidden_states, options = model.pre_layrnorm(hidden_states), {"attention_mask": None}
    if name == "dinov3_vit":
        options = {"position_embeddings": model.rope_embeddings(pixel_values)}
    for block in model.get_submodule(VISION_FAMILIES[name].blocks):
        hidden_states = block(hidden_states, **options)
    return hidden_states


def test_the_same_types_are_known_by_their_config_and_can_be_run():
    assert sorted(PATCHES_ONLY_FAMILIES) == sorted(CLASS_TOKEN_OPTIONAL)


@every_type
@torch.no_grad()
def test_equals_the_native_blocks_run_by_hand(name):
    encoder, pixel_values = without(name, final_norm=False), images(name, size=SIZE)
    features = encoder(pixel_values)
    got = torch.cat([features.class_tokens[0], features.registers[0], features.patches[0]], dim=1)
    torch.testing.assert_close(got, by_hand(name, encoder.model, pixel_values), rtol=1e-5, atol=1e-5)
    kept = VisionEncoder(encoder.model, final_norm=False)(pixel_values).patches[0]
    assert not torch.allclose(features.patches[0], kept, rtol=1e-3, atol=1e-3)  # the class token was attended to


@every_type
@torch.no_grad()
def test_facts_known_from_the_config_hold(name):
    encoder, pixel_values = without(name, layers=[0, -1]), images(name)
    facts = encoder_facts(encoder.config, class_token="drop_before")
    features = encoder(pixel_values)
    assert encoder.facts == facts and facts.num_class_tokens == 0
    assert features.grids == encoder.grids_for(32, 48) == ((4, 6), (4, 6))
    assert features.class_tokens[0].shape[1] == 0 and features.cls == (None, None)
    assert features.registers[1].shape[1] == facts.num_registers == CASES[name].get("num_register_tokens", 0)
    assert features.patches[1].shape[1] == 24
    assert features.pooled.shape == (2, facts.pooled_size)
    torch.testing.assert_close(features.pooled, features.patches[1].mean(dim=1))


@torch.no_grad()
def test_clip_positions_are_resampled_with_antialias_and_no_norm_follows():
    encoder, pixel_values = without("clip_vision_model", layers=[0, -1]), images("clip_vision_model", size=(16, 24))
    model = encoder.model
    table = model.embeddings.position_embedding.weight[1:].T.unflatten(1, (4, 4))[None]
    table = F.interpolate(table, size=(2, 3), mode="bicubic", antialias=True)
    expected = model.pre_layrnorm((model.embeddings.patch_embedding(pixel_values) + table).flatten(2).transpose(1, 2))
    features = encoder(pixel_values)
    torch.testing.assert_close(features.patches[0], expected)
    native = VisionEncoder(model, layers=[0])(pixel_values).patches[0]
    assert (native - expected).abs().max() > 0.01  # native interpolation has no antialias
    plain = VisionEncoder(model, layers=[0, -1], class_token="drop_before", final_norm=False)(pixel_values)
    assert torch.equal(plain.patches[1], features.patches[1])


@torch.no_grad()
def test_one_image_equals_a_batch_and_half_precision_stays():
    encoder, pixel_values = without("clip_vision_model"), images("clip_vision_model", 3)
    together, alone = encoder(pixel_values).patches[0], encoder(pixel_values[1:2]).patches[0]
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)
    half = encoder.to(torch.bfloat16)(pixel_values).patches[0]
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


def test_gradients_reach_all_but_the_class_token_and_its_norm():
    encoder = without("clip_vision_model")
    encoder(images("clip_vision_model")).patches[0].square().sum().backward()
    idle = {name for name, parameter in encoder.model.named_parameters() if parameter.grad is None}
    assert idle == {"embeddings.class_embedding", "post_layernorm.weight", "post_layernorm.bias"}
    positions = encoder.model.embeddings.position_embedding.weight.grad
    assert not positions[0].any() and positions[1:].any(dim=1).all()


@pytest.mark.parametrize("name", ["clip_vision_model", pytest.param("dinov3_vit", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiles_to_one_graph(name):
    encoder, pixel_values = without(name), images(name)
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")(pixel_values)
    torch.testing.assert_close(compiled.patches, encoder(pixel_values).patches)


def test_loads_from_a_checkpoint(tmp_path):
    model = build("clip_vision_model")
    model.save_pretrained(tmp_path)
    encoder = VisionEncoder.from_pretrained(tmp_path, class_token="drop_before").eval()
    pixel_values = images("clip_vision_model")
    assert torch.equal(encoder(pixel_values).patches[0], without("clip_vision_model")(pixel_values).patches[0])


@pytest.mark.parametrize("name", ["siglip_vision_model", "swin", "specialized_vit", "radio", "beit"])
def test_encoders_that_have_none_or_need_theirs_are_refused(name):
    for known in (lambda: without(name), lambda: encoder_facts(build(name).config, class_token="drop_before")):
        with pytest.raises(ValueError, match=rf"drop_before\" is not there for '{name}'.*clip_vision_model"):
            known()


def test_another_word_is_refused():
    with pytest.raises(ValueError, match=r"unknown class_token 'drop'; known: \['keep', 'drop_before'\]"):
        VisionEncoder({"model_type": "vit", **VIT}, class_token="drop")
    with pytest.raises(ValueError, match="unknown class_token None"):
        encoder_facts(resolve_config({"model_type": "vit", **VIT}), class_token=None)

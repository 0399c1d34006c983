"""The specialised ViT: how it starts, what its options do, what its backbone spares."""

import pytest
import torch
from transformers import AutoBackbone

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_specialized_vit import SpecializedViTBackbone, SpecializedViTModel

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tiny(**options) -> SpecializedViTModel:
    torch.manual_seed(0)
    return SpecializedViTModel(SpecializedViTConfig(**TINY | options)).eval()


def test_roles_start_independent_or_equal():
    for choice, same in (("independent", False), ("equal", True)):
        attention = tiny(cls_init=choice).encoder.layer[0].attention
        assert torch.equal(attention.q_proj.weight, attention.q_proj_cls.weight) is same


def test_low_rank_updates_start_at_zero():
    model = tiny(cls_rank=2)
    vanilla = tiny(norm_blocks="none", qkv_blocks="none")
    ups = [parameter for name, parameter in model.named_parameters() if "_cls_up" in name]
    assert len(ups) == 3 and not any(up.any() for up in ups)
    downs = [parameter for name, parameter in model.named_parameters() if "_cls_down" in name]
    assert all(down.abs().max() > 0.1 for down in downs)  # Kaiming-uniform with a = sqrt(5): up to 1 / sqrt(32)
    vanilla.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(PIXELS).last_hidden_state, vanilla(PIXELS).last_hidden_state)


def test_only_the_class_row_reads_the_class_weights():
    model = tiny(num_register_tokens=2)
    block = model.encoder.layer[-1]
    tokens = torch.randn(2, 19, 32)
    before = block(tokens)
    block.norm2_cls.weight.data += 1
    moved = (block(tokens) != before).any(dim=2)
    assert moved[:, 0].all() and not moved[:, 1:].any()
    as_cls = tiny(num_register_tokens=2, register_role="cls").encoder.layer[-1]
    before = as_cls(tokens)
    as_cls.norm2_cls.weight.data += 1
    assert (as_cls(tokens) != before).any(dim=2).sum(dim=1).tolist() == [3, 3]


def test_masked_tokens_change_nothing():
    for options in ({}, {"attention_bias": "kv"}, {"relative_position_bias": "shared"}):
        model = tiny(**options)
        mask = torch.ones(2, 17, dtype=torch.long)
        mask[:, 13:] = 0  # the last row of patches
        changed = PIXELS.clone()
        changed[:, :, 24:] = 7
        first, second = (model(images, attention_mask=mask).last_hidden_state for images in (PIXELS, changed))
        torch.testing.assert_close(first[:, :13], second[:, :13])
        assert not torch.allclose(model(PIXELS).last_hidden_state[:, :13], model(changed).last_hidden_state[:, :13])


def test_drop_path_is_shared_by_the_roles_of_a_sample():
    model = tiny(drop_path_rate=0.5, num_hidden_layers=1).train()
    tokens = torch.randn(64, 17, 32)
    model.encoder.layer[0].mlp.fc2.weight.data.zero_()
    moved = (model.encoder.layer[0](tokens) != tokens).any(dim=2)
    assert (moved.all(dim=1) | ~moved.any(dim=1)).all()
    assert 0 < moved.all(dim=1).sum() < 64


@pytest.mark.parametrize("options", [{}, {"cls_rank": 2}])
def test_backward_hooks_may_sit_on_any_layer(options):
    plain, hooked = tiny(**options), tiny(**options)
    fired = []
    for name, module in hooked.named_modules():
        if not list(module.children()):
            module.register_full_backward_hook(lambda *args, name=name: fired.append(name))
    for model in (plain, hooked):
        model(PIXELS).last_hidden_state.square().sum().backward()
    assert "encoder.layer.0.attention.q_proj" in fired and "encoder.layer.0.norm1" in fired
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in hooked.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


def test_patches_alone_decide_in_class_attention():
    model = tiny(class_attention_layers=2, class_attention_scale=1.0)
    states = model(PIXELS, output_hidden_states=True)
    torch.testing.assert_close(states.hidden_states[0][:, 0], states.hidden_states[-1][:, 0])
    model.embeddings.cls_token.data += 1
    other = model(PIXELS, output_hidden_states=True)
    torch.testing.assert_close(states.last_hidden_state[:, 1:], other.last_hidden_state[:, 1:])
    assert not torch.allclose(states.last_hidden_state[:, 0], other.last_hidden_state[:, 0])


def test_the_backbone_stops_at_the_deepest_map():
    backbone = SpecializedViTBackbone(SpecializedViTConfig(**TINY, out_indices=[0, -3])).eval()
    ran = []
    for index, layer in enumerate(backbone.encoder.layer):
        layer.register_forward_hook(lambda *args, index=index: ran.append(index))
    outputs = backbone(PIXELS)
    assert ran == [0] and outputs.hidden_states is None
    whole = backbone(PIXELS, output_hidden_states=True)
    assert len(whole.hidden_states) == 4
    for one, other in zip(outputs.feature_maps, whole.feature_maps, strict=True):
        assert torch.equal(one, other) and one.shape == (2, 32, 4, 4)


def test_maps_and_sequences_of_the_backbone_agree():
    config = SpecializedViTConfig(**TINY, num_register_tokens=2, specialize_final_norm=True)
    maps = SpecializedViTBackbone(config).eval()
    sequences = AutoBackbone.from_config(
        SpecializedViTConfig(**config.to_dict() | {"reshape_hidden_states": False})
    ).eval()
    sequences.load_state_dict(maps.state_dict())
    patches = sequences(PIXELS).feature_maps[0][:, 3:]
    torch.testing.assert_close(patches.transpose(1, 2).unflatten(2, (4, 4)), maps(PIXELS).feature_maps[0])


def test_blocks_are_resolved_once_and_kept(tmp_path):
    config = SpecializedViTConfig(**TINY | {"num_hidden_layers": 40})
    assert config.qkv_blocks == list(range(13)) and config.norm_blocks == list(range(40))
    assert config.requested_blocks["qkv_blocks"] == "first_third"
    config.save_pretrained(tmp_path)
    loaded = SpecializedViTConfig.from_pretrained(tmp_path, proj_blocks=2)
    assert loaded.qkv_blocks == config.qkv_blocks and loaded.proj_blocks == [0, 1]
    assert loaded.requested_blocks == config.requested_blocks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hiden_size": 3}, "no option 'hiden_size' .did you mean hidden_size"),
        ({"qkv_blocks": [0, 3]}, r"qkv_blocks has the block indices \[3\], expected 0 to 2"),
        ({"norm_blocks": 4}, "norm_blocks=4 asks for more blocks than the 3"),
        ({"norm_blocks": "first_half"}, "norm_blocks must be one of"),
        ({"num_cls_tokens": 0}, "num_cls_tokens must be at least 1"),
        ({"cls_rank": 2, "qkv_blocks": "none"}, "cls_rank=2 acts on linear layers"),
        ({"attention_bias": "sigmoid"}, "attention_bias must be one of"),
        ({"class_attention_layers": 1, "qkv_blocks": [0]}, "see no class token"),
        ({"hidden_size": 30}, "hidden_size=30 is not a multiple of num_attention_heads=4"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"qkv_parts": "qx"}, "letters q, k, v"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(Exception, match=message):
        SpecializedViTConfig(**TINY | options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 32, 32), "expected 3 image channels, got 4"),
        ((2, 3, 4, 32), "image of 4x32 pixels is smaller than one patch of 8x8"),
        ((3, 32, 32), "expected pixel_values"),
    ],
)
def test_bad_images_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape))

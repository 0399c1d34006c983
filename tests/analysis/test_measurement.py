import copy

import pytest
import torch
import torch.nn.functional as F
import transformers

from vitweave.analysis.measurement import measure
from vitweave.analysis.taps import TAPS
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_specialized_vit import SpecializedViTBackbone, SpecializedViTModel

TINY = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4)
WIDE = dict(intermediate_size=64)
PIXELS = torch.randn(4, 3, 16, 24, generator=torch.Generator().manual_seed(0))

PLAIN = {  # class and register tokens of each family
    "ViT": (1, 0, WIDE),
    "DeiT": (2, 0, WIDE),
    "Dinov2": (1, 0, {}),
    "Dinov2WithRegisters": (1, 4, {}),
    "DINOv3ViT": (1, 2, {**WIDE, "num_register_tokens": 2}),
    "Beit": (1, 0, {**WIDE, "use_relative_position_bias": True}),
    "CLIPVision": (1, 0, WIDE),
    "SiglipVision": (0, 0, WIDE),
    "ViTMAE": (1, 0, {**WIDE, "mask_ratio": 0.0}),
}


def build(name, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**TINY, **options)
    return getattr(transformers, f"{name}Model")(config).eval()


def specialized(cls=SpecializedViTModel, **flags):
    """A specialised ViT whose twins all differ."""
    torch.manual_seed(0)
    model = cls(SpecializedViTConfig(**TINY, **flags)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "layer_scale" in name:
                parameter.add_(torch.randn_like(parameter))
    return model


def all_numbers(measured):
    numbers = {"norms": measured.patch_norms, "features": measured.features}
    for tap, statistics in measured.taps.items():
        numbers |= {f"{tap}.{name}": values for name, values in vars(statistics).items() if values is not None}
    return numbers


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_every_plain_vit_is_measured(name):
    num_cls, num_registers, options = PLAIN[name]
    measured = measure(build(name, **options), [PIXELS])
    assert (measured.layout.num_cls, measured.layout.num_registers) == (num_cls, num_registers)
    assert measured.grid == (4, 6) and measured.norm_block == 2
    assert tuple(measured.taps) == TAPS
    assert all(torch.isfinite(values).all() for values in all_numbers(measured).values())
    for statistics in measured.taps.values():
        assert statistics.patch_patch_cosine.shape == (3, 4)
        assert (statistics.cls_patch_cosine is None) == (num_cls == 0)
        assert (statistics.cls_register_cosine is None) == (num_registers == 0)
    assert ("cls_patch_cosine" in measured.skipped) == (num_cls == 0)


def test_numbers_by_brute_force():
    model = build("Dinov2WithRegisters")
    states = model(PIXELS, output_hidden_states=True).hidden_states
    measured = measure(model, [PIXELS])
    for block, layer in enumerate(model.encoder.layer):
        for tap, tokens in (("before.norm1", states[block]), ("after.norm1", layer.norm1(states[block]))):
            statistics, cls, patches = measured.taps[tap], tokens[:, :1], tokens[:, 5:]
            cosine = F.cosine_similarity(cls, patches, dim=-1).double()
            registers = F.cosine_similarity(cls, tokens[:, 1:5], dim=-1).double()
            for values, expected in (
                (statistics.cls_patch_cosine, cosine.mean(dim=1)),
                (statistics.cls_patch_cosine_std, cosine.std(dim=1, correction=0)),
                (statistics.cls_register_cosine, registers.mean(dim=1)),
                (statistics.abs_mean_cls, cls.abs().double().mean(dim=(0, 1))),
                (statistics.abs_mean_patch, patches.abs().double().mean(dim=(0, 1))),
            ):
                torch.testing.assert_close(values[block], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(measured.patch_norms, states[3][:, 5:].norm(dim=-1).double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        measure(model, [PIXELS], norm_block=0).patch_norms.float(), states[1][:, 5:].norm(dim=-1)
    )
    torch.testing.assert_close(measured.features, model(PIXELS).last_hidden_state[:, 5:])


def test_class_rows_after_a_norm_are_those_of_the_twin():
    model, seen = specialized(), {}
    layer = model.encoder.layer[1]
    for name in ("norm1", "norm2"):
        getattr(layer, name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].clone()}))
    measured = measure(model, [PIXELS])
    for name, tokens in seen.items():
        found = measured.taps[f"after.{name}"]
        cls, patches = getattr(layer, f"{name}_cls")(tokens[:, 0]), getattr(layer, name)(tokens[:, 1:])
        torch.testing.assert_close(found.abs_mean_cls[1].float(), cls.abs().mean(dim=0))
        torch.testing.assert_close(found.abs_mean_patch[1].float(), patches.abs().mean(dim=(0, 1)))
        patch_weights_on_cls = getattr(layer, name)(tokens[:, 0]).abs().mean(dim=0)
        assert not torch.allclose(found.abs_mean_cls[1].float(), patch_weights_on_cls, atol=0.1)


def test_equal_twins_measure_as_the_vanilla_model():
    flags = dict(layerscale_value=0.5, num_register_tokens=2, qkv_blocks="all")
    model = specialized(**flags)
    vanilla = SpecializedViTModel(SpecializedViTConfig(**TINY, **flags | dict(specialize_norm=False, qkv_blocks=0)))
    state = model.state_dict()
    for name in state:
        if "_cls." in name:
            state[name] = state[name.replace("_cls.", ".")]
    model.load_state_dict(state)
    vanilla.load_state_dict({name: value for name, value in state.items() if "_cls." not in name})
    expected = all_numbers(measure(vanilla, [PIXELS]))
    for name, values in all_numbers(measure(model, [PIXELS])).items():
        torch.testing.assert_close(values, expected[name], atol=1e-5, rtol=1e-5, msg=name)


def test_batches_make_no_difference():
    model = specialized(num_register_tokens=2, register_role="cls").double()
    at_once = all_numbers(measure(model, [PIXELS.double()]))
    for name, values in all_numbers(measure(model, PIXELS.double().split([1, 3]))).items():
        torch.testing.assert_close(values, at_once[name], atol=1e-12, rtol=1e-12, msg=name)


def test_a_backbone_is_measured_up_to_its_deepest_layer():
    model = specialized(SpecializedViTBackbone, out_features=["stage2"])
    measured = measure(model, [PIXELS])
    assert measured.taps["before.norm1"].cls_patch_cosine.shape == (2, 4) and measured.norm_block == 1
    expected = model(PIXELS).feature_maps[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(measured.features, expected)


def test_class_attention_blocks_have_no_class_token():
    measured = measure(specialized(class_attention_layers=2), [PIXELS])
    assert measured.taps["after.norm1"].cls_patch_cosine is None
    assert measured.taps["after.norm1"].patch_patch_cosine.shape == (3, 4)
    assert "run without their class token" in measured.skipped["cls_patch_cosine"]


def test_models_of_several_stages_keep_their_last_features():
    config = transformers.SwinConfig(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    measured = measure(transformers.SwinModel(config), [torch.randn(2, 3, 32, 64)])
    assert not measured.taps and measured.features.shape == (2, 32, 32) and measured.grid == (4, 8)
    assert "no plain ViT" in measured.skipped["token_similarity"]


def test_nothing_is_left_behind():
    model = build("ViT", **WIDE).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="NaN"):
        measure(model, [PIXELS, PIXELS / 0])
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_refusals():
    model = build("Dinov2")
    with pytest.raises(ValueError, match="at least one batch"):
        measure(model, [])
    with pytest.raises(ValueError, match="images of one size: 4x6 patches so far, now 4x4"):
        measure(model, [PIXELS, PIXELS[..., :16]])
    with pytest.raises(ValueError, match="norm_block 3 is out of range"):
        measure(model, [PIXELS], norm_block=3)
    with pytest.raises(ValueError, match="batch, channels, height, width"):
        measure(model, [PIXELS[0]])
    with torch.no_grad():
        model.encoder.layer[1].mlp.fc1.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"before.norm1 of block 2 in image\(s\) \[0, 1, 2, 3\]"):
        measure(model, [PIXELS])

"""Projectors: their formulas by hand, the projectors of transformers, names and refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, InternVLConfig, InternVLVisionConfig, LlamaConfig, LlavaConfig, Qwen2Config
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vitweave.modeling.projectors import PROJECTORS, build_projector

NAMES = [name for name in sorted(PROJECTORS) if name != "mlpNx_gelu"] + ["mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu"]
KEEPS_WIDTH = ("identity", "residual")


def build(name: str) -> nn.Module:
    return build_projector(name, 32, 32 if name in KEEPS_WIDTH else 48)


@pytest.mark.parametrize("name", NAMES)
def test_every_projector_trains_alone_as_in_a_batch(name):
    projector, tokens = build(name), torch.randn(3, 5, 32)
    projected = projector(tokens)
    assert projected.shape == (3, 5, 32 if name in KEEPS_WIDTH else 48)
    torch.testing.assert_close(projector(tokens[:1]), projected[:1])
    torch.testing.assert_close(torch.compile(projector, fullgraph=True, backend="eager")(tokens), projected)
    (projected * torch.randn_like(projected)).sum().backward() if list(projector.parameters()) else None
    assert not [n for n, p in projector.named_parameters() if p.grad is None or not p.grad.any()]
    low = build(name).bfloat16()(tokens.bfloat16())
    assert low.dtype == torch.bfloat16 and torch.isfinite(low).all()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_number_in_the_name_is_the_number_of_layers(depth):
    projector, tokens = build_projector(f"mlp{depth}x_gelu", 4, 6), torch.randn(2, 3, 4)
    layers = [getattr(projector, f"linear_{number}") for number in range(1, depth + 1)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(4, 6)] + [(6, 6)] * (depth - 1)
    expected = layers[0](tokens)
    for layer in layers[1:]:
        expected = layer(F.gelu(expected))
    assert torch.equal(projector(tokens), expected)
    assert torch.equal(build_projector("identity", 4, 4)(tokens), tokens)


def test_names_and_values_are_those_of_transformers():
    tokens = torch.randn(2, 3, 32)
    llava = LlavaMultiModalProjector(
        LlavaConfig(
            vision_config=CLIPVisionConfig(hidden_size=32, num_attention_heads=2),
            text_config=LlamaConfig(hidden_size=48, num_attention_heads=2),
            projector_hidden_act="gelu",
        )
    )
    ours = build_projector("mlp2x_gelu", 32, 48)
    ours.load_state_dict(llava.state_dict())
    torch.testing.assert_close(ours(tokens), llava(tokens))
    internvl = InternVLMultiModalProjector(
        InternVLConfig(
            vision_config=InternVLVisionConfig(hidden_size=8, num_attention_heads=2),
            text_config=Qwen2Config(hidden_size=48, num_attention_heads=2),
            downsample_ratio=0.5,
        )
    )
    ours = build_projector("norm_mlp", 32, 48)
    ours.load_state_dict(internvl.state_dict())
    torch.testing.assert_close(ours(tokens), internvl(tokens))


def test_squeeze_and_excite_weighs_channels_by_the_whole_image():
    projector, tokens = build_projector("se_mlp", 4, 6), torch.randn(2, 3, 4)
    expected = []
    for image in tokens:
        weights = torch.sigmoid(projector.excite.weight @ F.gelu(projector.squeeze.weight @ image.mean(dim=0)))
        expected.append(projector.linear_2(F.gelu(projector.linear_1(image * (1 + weights)))))
    torch.testing.assert_close(projector(tokens), torch.stack(expected))


def test_the_residual_block_adds_to_the_normalised_input():
    projector, tokens = build_projector("residual", 4, 4), 5 * torch.randn(2, 3, 4)
    nn.init.zeros_(projector.linear_2.weight)
    torch.testing.assert_close(projector(tokens), F.layer_norm(tokens, (4,)) + projector.linear_2.bias)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"unknown projector 'norm_mpl' \(did you mean 'norm_mlp'"):
        build_projector("norm_mpl", 4, 6)
    with pytest.raises(ValueError, match="expected a projector of at least one layer, got mlp0x_gelu"):
        build_projector("mlp0x_gelu", 4, 6)
    with pytest.raises(ValueError, match="the projector 'linear' has no option 'bias'"):
        build_projector("linear", 4, 6, bias=False)
    for name in KEEPS_WIDTH:
        with pytest.raises(ValueError, match=f"with the projector '{name}', got 4 instead of 6"):
            build_projector(name, 4, 6)

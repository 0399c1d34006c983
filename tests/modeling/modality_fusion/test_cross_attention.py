import copy

import pytest
import torch
import torch.nn.functional as F
from modality_streams import check_absent_streams, fuse, random_streams
from torch import nn

from vitweave.modeling.modality_fusion.base import BlockInputs
from vitweave.modeling.modality_fusion.registry import build_modality_fusion

OPTIONS = [{}, {"form": "paper"}, {"per_token": True}, {"form": "paper", "per_token": True}]


def build(modalities=2, hidden=32, start="released", **options):
    """With all weights random, so that wrong wiring shows."""
    torch.manual_seed(0)
    fusion = build_modality_fusion("cross_attention", modalities, hidden, {"start": start} | options)
    if start == "released":
        for tensor in fusion.state_dict().values():
            nn.init.normal_(tensor, std=0.4)
    return fusion.eval()


@torch.no_grad()
@pytest.mark.parametrize("modalities", [2, 3])
def test_it_is_attention_to_the_tokens_of_the_others(modalities):
    fusion, streams = build(modalities), random_streams(modalities)
    fused = fuse(fusion, streams)
    for m in range(modalities):
        unit = nn.MultiheadAttention(32, 8, batch_first=True)
        packed = [layer.weight[m] for layer in (fusion.to_query, fusion.to_key, fusion.to_value)]
        unit.in_proj_weight.copy_(torch.cat(packed))
        unit.in_proj_bias.copy_(torch.cat([fusion.to_query.bias[m], fusion.key_bias[m], fusion.to_value.bias[m]]))
        unit.out_proj.weight.copy_(fusion.to_output.weight[m])
        unit.out_proj.bias.copy_(fusion.to_output.bias[m])
        context = torch.cat([streams[o] for o in range(modalities) if o != m], dim=1)
        torch.testing.assert_close(fused[m], streams[m] + unit(streams[m], context, context)[0], atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("modalities", [2, 3])
def test_per_token_is_attention_over_maps_of_one_token(modalities):
    every, own_place = build(modalities), build(modalities, per_token=True)
    streams = random_streams(modalities)
    single = streams.transpose(1, 2).flatten(1, 2).unsqueeze(2)  # every token an image
    expected = fuse(every, single).view(modalities, 15, 2, 32).transpose(1, 2)
    torch.testing.assert_close(fuse(own_place, streams), expected)


@torch.no_grad()
def test_gemini_states_drive_it():
    gemini = build_modality_fusion("gemini", 2, 32, {"start": "released"})
    missing, extra = build().load_state_dict(gemini.state_dict(), strict=False)
    assert not missing and all(name.startswith(("relation.", "key_noise", "value_noise")) for name in extra)


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("modalities", [2, 3])
def test_swapping_the_modalities_and_their_weights_swaps_the_outputs(modalities, options):
    fusion, streams = build(modalities, **options), random_streams(modalities)
    order = list(range(modalities))[::-1]
    swapped = copy.deepcopy(fusion)
    if fusion.form == "released":
        swapped.load_state_dict({name: tensor[order] for name, tensor in fusion.state_dict().items()})
    torch.testing.assert_close(fuse(swapped, streams[order]), fuse(fusion, streams)[order], atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("per_token", [False, True])
def test_two_present_of_three_fuse_as_two(per_token):
    fusion, streams = build(3, per_token=per_token), random_streams(3)
    for pair in ([0, 1], [0, 2], [1, 2]):
        two = build(2, per_token=per_token)
        two.load_state_dict({name: tensor[pair] for name, tensor in fusion.state_dict().items()})
        present = [[modality in pair] * 2 for modality in range(3)]
        torch.testing.assert_close(fuse(fusion, streams, present)[pair], fuse(two, streams[pair]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("modalities", [2, 3])
def test_an_absent_modality_says_nothing(modalities, options):
    check_absent_streams(build(modalities, **options), random_streams(modalities))


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
def test_it_starts_as_the_identity_or_as_released(options):
    streams = random_streams(3)
    assert torch.equal(fuse(build(3, start="identity", **options), streams), streams)
    released = build_modality_fusion("cross_attention", 3, 32, {"start": "released"} | options)
    assert not torch.equal(fuse(released, streams), streams)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("modalities", [2, 3])
def test_every_trained_weight_gets_a_gradient(modalities, options):
    fusion = build(modalities, **options)
    fuse(fusion, random_streams(modalities)).square().sum().backward()
    trained = {name: parameter for name, parameter in fusion.named_parameters() if parameter.requires_grad}
    idle = [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()]
    assert not idle
    frozen = {name.split(".")[0] for name, _ in fusion.named_parameters() if name not in trained}
    assert frozen == ({"to_query", "to_key"} if options.get("per_token") and modalities == 2 else set())


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
def test_an_image_alone_gives_what_it_gives_in_a_batch(options):
    fusion, streams = build(3, **options), random_streams(3, batch=3)
    for image in range(3):
        torch.testing.assert_close(
            fuse(fusion, streams[:, image, None])[:, 0], fuse(fusion, streams)[:, image], atol=2e-5, rtol=1e-5
        )


@pytest.mark.parametrize("per_token", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled(per_token):
    fusion, streams = build(3, per_token=per_token), random_streams(3)
    present = torch.tensor([[True, True], [True, False], [True, True]])
    compiled = torch.compile(fusion, fullgraph=True, backend="eager")
    found, _ = compiled(streams, BlockInputs(streams, (3, 5), present))
    torch.testing.assert_close(found, fuse(fusion, streams, present.tolist()))


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
def test_half_precision(options):
    torch.manual_seed(0)
    fusion = build_modality_fusion("cross_attention", 3, 32, {"start": "released"} | options)
    streams = random_streams(3)
    half = fuse(copy.deepcopy(fusion).bfloat16(), streams.bfloat16())
    assert half.dtype == torch.bfloat16
    assert F.cosine_similarity(half.float(), fuse(fusion, streams), dim=-1).min() > 0.999

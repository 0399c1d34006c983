import copy

import pytest
import torch
import torch.nn.functional as F
from modality_streams import check_absent_streams, fuse, random_streams
from torch import nn

from vitweave.modeling.conversion.gemini_units import from_official_units, to_official_units
from vitweave.modeling.modality_fusion.base import BlockInputs
from vitweave.modeling.modality_fusion.registry import build_modality_fusion

FORMS = ["released", "paper"]


def build(modalities=2, hidden=32, start="released", **options):
    """With all weights random, so that wrong wiring shows."""
    torch.manual_seed(0)
    fusion = build_modality_fusion("gemini", modalities, hidden, {"start": start} | options)
    if start == "released":
        for tensor in fusion.state_dict().values():
            nn.init.normal_(tensor, std=0.4)
    return fusion.eval()


def formula(fusion, streams, m):
    """Stream m by keys and values one beside the other, as the papers write them; any number of modalities."""
    unit = 0 if fusion.form == "paper" else m

    def project(layer, x, bias=None):
        return F.linear(x, layer.weight[unit], bias)

    bias = {name: None for name in ("query", "key", "value")}
    if fusion.form == "released":
        bias = {"query": fusion.to_query.bias[m], "key": fusion.key_bias[m], "value": fusion.to_value.bias[m]}
    own, relation = streams[m], fusion.relation
    keys, values = [own + fusion.key_noise[unit]], [own + fusion.value_noise[unit]]
    for o in range(streams.shape[0]):
        if o != m:
            first = torch.cat([relation.own_proj.weight, relation.other_proj.weight], dim=1)
            hidden = F.linear(torch.cat([own, streams[o]], dim=-1), first, relation.own_proj.bias)
            keys.append(own * relation.gate_proj(F.gelu(hidden)).softmax(dim=-1))
            values.append(streams[o])
    query = project(fusion.to_query, own, bias["query"])
    keys = project(fusion.to_key, torch.stack(keys, dim=2), bias["key"])  # (batch, tokens, modalities, hidden)
    values = project(fusion.to_value, torch.stack(values, dim=2), bias["value"])
    query, keys, values = (fusion.by_head(part) for part in (query.unsqueeze(2), keys, values))
    shares = ((query * keys).sum(dim=-1, keepdim=True) / keys.shape[-1] ** 0.5).softmax(dim=2)
    mixed = (shares * values).sum(dim=2).flatten(-2)
    return own + (mixed if fusion.form == "paper" else project(fusion.to_output, mixed, fusion.to_output.bias[m]))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("modalities", [2, 3, 4])
def test_differences_give_what_the_formula_gives(form, modalities):
    fusion, streams = build(modalities, form=form).double(), random_streams(modalities).double()
    fused = fuse(fusion, streams)
    for m in range(modalities):
        torch.testing.assert_close(fused[m], formula(fusion, streams, m))


@torch.no_grad()
@pytest.mark.parametrize("modalities", [2, 3])
def test_swapping_the_modalities_and_their_weights_swaps_the_outputs(modalities):
    fusion, streams = build(modalities), random_streams(modalities)
    order = list(range(modalities))[::-1]
    shared = {name for name in fusion.state_dict() if name.startswith("relation.")}
    swapped = copy.deepcopy(fusion)
    swapped.load_state_dict({name: t if name in shared else t[order] for name, t in fusion.state_dict().items()})
    torch.testing.assert_close(fuse(swapped, streams[order]), fuse(fusion, streams)[order])
    assert not torch.allclose(fuse(fusion, streams[order]), fuse(fusion, streams)[order], atol=1e-2)


@torch.no_grad()
def test_two_present_of_three_fuse_as_two():
    fusion, streams = build(3), random_streams(3)
    state = fusion.state_dict()
    for pair in ([0, 1], [0, 2], [1, 2]):
        two = build(2)
        two.load_state_dict({name: t if name.startswith("relation.") else t[pair] for name, t in state.items()})
        present = [[modality in pair] * 2 for modality in range(3)]
        torch.testing.assert_close(fuse(fusion, streams, present)[pair], fuse(two, streams[pair]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("modalities", [2, 3])
def test_an_absent_modality_says_nothing(form, modalities):
    check_absent_streams(build(modalities, form=form), random_streams(modalities))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_it_starts_as_the_identity_or_as_released(form):
    streams = random_streams(3)
    assert torch.equal(fuse(build(3, start="identity", form=form), streams), streams)
    released = build_modality_fusion("gemini", 3, 256, {"start": "released", "form": form})
    assert not torch.equal(fuse(released, random_streams(3, hidden=256)), random_streams(3, hidden=256))
    assert released.key_noise.std() == pytest.approx(1, abs=0.2)
    assert released.relation.own_proj.weight.std() == pytest.approx(0.02, rel=0.1)
    packed = nn.MultiheadAttention(256, 8).in_proj_weight  # Xavier of three matrices at once
    for layer in (released.to_query, released.to_key, released.to_value):
        assert layer.weight.std() == pytest.approx(packed.std().item(), rel=0.05)


def test_in_the_first_steps_every_weight_gets_a_gradient():
    fusion, streams = build(start="identity"), random_streams()
    optimizer = torch.optim.SGD(fusion.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        fuse(fusion, streams).square().sum().backward()
        idle = {name for name, parameter in fusion.named_parameters() if not parameter.grad.any()}
        assert not any(name.startswith("to_output") for name in idle) and (step == 0 or not idle)
        optimizer.step()


@pytest.mark.parametrize("modalities", [2, 3])
def test_gradients_are_those_of_the_formula(modalities):
    fusion, streams = build(modalities).double(), random_streams(modalities).double().requires_grad_()
    watched = [streams, *fusion.parameters()]
    weights = random_streams(modalities, seed=1).double()
    found = torch.autograd.grad((fuse(fusion, streams) * weights).sum(), watched)
    by_formula = torch.stack([formula(fusion, streams, m) for m in range(modalities)])
    torch.testing.assert_close(found, torch.autograd.grad((by_formula * weights).sum(), watched))


@torch.no_grad()
@pytest.mark.parametrize("modalities", [2, 3])
def test_an_image_alone_gives_what_it_gives_in_a_batch(modalities):
    fusion, streams = build(modalities), random_streams(modalities, batch=3)
    for image in range(3):
        torch.testing.assert_close(fuse(fusion, streams[:, image, None])[:, 0], fuse(fusion, streams)[:, image])


@torch.no_grad()
def test_tokens_of_other_places_do_not_matter():
    fusion, streams = build(), random_streams()
    changed = streams.clone()
    changed[:, :, 1:] += 1
    assert torch.equal(fuse(fusion, changed)[:, :, 0], fuse(fusion, streams)[:, :, 0])


@torch.no_grad()
def test_the_bias_of_the_keys_is_kept_without_effect():
    fusion, streams = build(), random_streams()
    expected = fuse(fusion, streams)
    assert "key_bias" in fusion.state_dict() and "key_bias" not in dict(fusion.named_parameters())
    fusion.key_bias.fill_(7)
    assert torch.equal(fuse(fusion, streams), expected)


@pytest.mark.parametrize("hidden", [64, 320])
def test_the_size_is_the_published_one(hidden):
    with torch.device("meta"):
        fusion = build_modality_fusion("gemini", 2, hidden)
    assert sum(tensor.numel() for tensor in fusion.state_dict().values()) == 11 * hidden**2 + 14 * hidden


def test_official_names_there_and_back():
    fusion = build()
    state = {f"encoder.block1.0.attn.{name}": tensor for name, tensor in fusion.state_dict().items()} | {"alpha": 0}
    official = to_official_units(state)
    assert official["encoder.block1.0.attn.cross_attn_1_to_0.in_proj_weight"].shape == (96, 32)
    assert official["encoder.block1.0.attn.relation_judger.0.fc1.weight"].shape == (32, 64)
    again = from_official_units(official)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items() if name != "alpha")
    with pytest.raises(ValueError, match="two modalities, the official form; 'key_bias' has 3"):
        to_official_units(build(3).state_dict())


@pytest.mark.parametrize("modalities", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_compiled_and_exported(modalities):
    fusion, streams = build(modalities), random_streams(modalities)
    present = torch.ones(modalities, 2, dtype=torch.bool)
    present[-1, 0] = False

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.fusion = fusion

        def forward(self, streams, present):
            return self.fusion(streams, BlockInputs(streams, (3, 5), present))[0]

    compiled = torch.compile(Plain(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(streams, present), fuse(fusion, streams, present.tolist()))
    free = {1: torch.export.Dim("batch", min=2, max=64)}
    exported = torch.export.export(Plain(), (streams, present), dynamic_shapes=(free, free)).module()
    more = random_streams(modalities, batch=5)
    mask = torch.ones(modalities, 5, dtype=torch.bool)
    torch.testing.assert_close(exported(more, mask), fuse(fusion, more))


@torch.no_grad()
@pytest.mark.parametrize("modalities", [2, 3])
def test_half_precision(modalities):
    torch.manual_seed(0)
    fusion, streams = build_modality_fusion("gemini", modalities, 32, {"start": "released"}), random_streams(modalities)
    half = fuse(copy.deepcopy(fusion).bfloat16(), streams.bfloat16())
    assert half.dtype == torch.bfloat16
    assert F.cosine_similarity(half.float(), fuse(fusion, streams), dim=-1).min() > 0.999


def test_an_adapter_reaches_the_stacked_projections():
    from peft import LoraConfig, get_peft_model

    fusion, streams = build(), random_streams()
    expected = fuse(fusion, streams)
    host = nn.Sequential()
    host.fusion = fusion
    config = LoraConfig(target_modules=["own_proj"], target_parameters=["fusion.to_query.weight"], r=2)
    adapted = get_peft_model(host, config).base_model.model.fusion
    torch.testing.assert_close(fuse(adapted, streams), expected)
    fuse(adapted, streams).square().sum().backward()
    moved = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert any("to_query" in name for name in moved) and any("own_proj" in name for name in moved)
    assert all("lora" in name for name in moved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads to divide hidden_size=32, got 5"),
        ({"form": "eq6"}, "expected form to be one of"),
        ({"start": "zero"}, "expected start to be one of"),
        ({"heads": 4}, "no option 'heads'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_modality_fusion("gemini", 2, 32, options)
    with pytest.raises(ValueError, match="at least two modalities"):
        build_modality_fusion("gemini", 1, 32)

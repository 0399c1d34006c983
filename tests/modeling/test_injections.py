"""What is injected between an encoder's blocks goes on from there, and nowhere else."""

from functools import partial

import pytest
import torch
from tiny_encoders import CASES, build, images
from torch import Tensor, nn

from vitweave.modeling.vision_encoder import VisionEncoder
from vitweave.modeling.vision_families.registry import VISION_FAMILIES

REFUSING = [name for name in CASES if not VISION_FAMILIES[name.split("-")[0]].takes_injections]
TAKING = sorted(set(CASES) - set(REFUSING))


def states(encoder: VisionEncoder, pixel_values: Tensor, **options) -> list[Tensor]:
    features = encoder(pixel_values, **options)
    parts = zip(features.class_tokens, features.registers, features.patches, strict=True)
    return [torch.cat(tokens, dim=1) for tokens in parts]


def all_layers(name: str, **options) -> VisionEncoder:
    model = build(name)
    first = VisionEncoder(model).facts.first_layer
    return VisionEncoder(model, layers=range(first, VisionEncoder(model).num_layers + 1), final_norm=False, **options)


@pytest.mark.parametrize("name", TAKING)
@torch.no_grad()
def test_the_identity_changes_nothing(name):
    encoder, pixel_values = all_layers(name), images(name)
    identity = dict.fromkeys(range(1, encoder.num_layers + 1), lambda patches: patches)
    for expected, got in zip(states(encoder, pixel_values), states(encoder, pixel_values, after=identity), strict=True):
        assert torch.equal(got, expected)
    pooled = encoder(pixel_values, after=identity).pooled
    assert torch.equal(pooled, encoder(pixel_values).pooled)


@pytest.mark.parametrize("name", TAKING)
@torch.no_grad()
def test_a_change_is_seen_from_its_block_on(name):
    encoder, pixel_values = all_layers(name), images(name)
    grid = encoder.facts.grid_for(*pixel_values.shape[-2:], 2)
    change = torch.randn(encoder.facts.hidden_sizes[2], *grid, generator=torch.Generator().manual_seed(2))
    seen = []

    def add(patches: Tensor) -> Tensor:
        seen.append(patches)
        return patches + change

    before = states(encoder, pixel_values)
    after = states(encoder, pixel_values, after={2: add})
    where = encoder.layers.index(2)
    for layer in range(where):
        assert torch.equal(after[layer], before[layer])
    prefix = encoder.facts.num_class_tokens + encoder.facts.num_registers
    assert seen[0].shape == (2, *change.shape)
    assert torch.equal(seen[0].flatten(2).transpose(1, 2), before[where][:, prefix:])  # row by row
    if "cait" not in name:  # behind whose blocks the class tokens are read out
        assert torch.equal(after[where][:, :prefix], before[where][:, :prefix])
    torch.testing.assert_close(after[where][:, prefix:], before[where][:, prefix:] + change.flatten(1).T)
    for layer in range(where + 1, len(before)):
        assert not torch.allclose(after[layer], before[layer], atol=1e-3)


@torch.no_grad()
def test_without_class_token_the_whole_sequence_is_the_map():
    encoder, pixel_values = all_layers("clip_vision_model", class_token="drop_before"), images("clip_vision_model")
    doubled = encoder(pixel_values, after={1: lambda patches: 2 * patches})
    plain = encoder(pixel_values)
    assert torch.equal(doubled.patches[1], 2 * plain.patches[1])
    assert not torch.allclose(doubled.patches[2], plain.patches[2])


class Adapted(nn.Module):
    """An encoder with an adapter after block 2 that reads a second map, as LLaVA-HR has it."""

    def __init__(self, name: str):
        super().__init__()
        self.encoder = VisionEncoder(build(name), layers=[-1])
        width = self.encoder.facts.hidden_sizes[2]
        self.adapter = nn.Bilinear(1, 1, 1)
        self.mix = nn.Conv2d(width, width, 3, padding=1)

    def inject(self, patches: Tensor, slow: Tensor) -> Tensor:
        return patches + self.mix(patches) + self.adapter(slow, slow)

    def forward(self, pixel_values: Tensor, slow: Tensor) -> Tensor:
        return self.encoder(pixel_values, after={2: partial(self.inject, slow=slow)}).patches[0]


@pytest.mark.parametrize(
    "name", ["clip_vision_model", "specialized_vit", pytest.param("sam_vision_model", marks=pytest.mark.slow)]
)
def test_compiles_to_one_graph_and_trains_the_adapter(name):
    model, pixel_values, slow = Adapted(name), images(name), torch.ones(1)
    torch._dynamo.reset()
    expected = model(pixel_values, slow)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(pixel_values, slow)
    torch.testing.assert_close(compiled, expected)
    expected.square().sum().backward()
    assert all(parameter.grad.any() for parameter in (*model.adapter.parameters(), *model.mix.parameters()))


@torch.no_grad()
def test_bfloat16():
    model = Adapted("clip_vision_model").to(torch.bfloat16)
    output = model(images("clip_vision_model"), torch.ones(1, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


@pytest.mark.parametrize("name", REFUSING)
def test_encoders_that_run_their_own_blocks_refuse(name):
    with pytest.raises(ValueError, match=r"expected no `after` for Swin.*another encoder"):
        VisionEncoder(build(name))(images(name), after={1: lambda patches: patches})


@pytest.mark.parametrize("wrong", [0, -1, 4])
def test_blocks_that_do_not_run_are_refused(wrong):
    encoder = VisionEncoder(build("vit"), layers=[1, 3])
    with pytest.raises(ValueError, match=rf"blocks 1\.\.3, where 3 is the deepest.*got \[{wrong}\]"):
        encoder(images("vit"), after={1: lambda patches: patches, wrong: lambda patches: patches})


def test_blocks_behind_the_deepest_asked_for_are_refused_unless_all_run():
    encoder, pixel_values = VisionEncoder(build("vit"), layers=[1]), images("vit")
    with pytest.raises(ValueError, match=r"blocks 1\.\.1"):
        encoder(pixel_values, after={2: lambda patches: patches})
    assert len(encoder(pixel_values, all_layers=True, after={2: lambda patches: patches}).patches) == 4


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_a_map_of_another_shape_is_refused(name):
    with pytest.raises(ValueError, match=r"expected after\[1\] to return a map of the shape.*got \(2, 3, 4\)"):
        VisionEncoder(build(name))(images(name), after={1: lambda patches: torch.zeros(2, 3, 4)})

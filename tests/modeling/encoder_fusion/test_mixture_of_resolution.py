"""MR-Adapters: the identity at the start, the formulas of code and paper, grids, gradients, and the whole tower."""

import pytest
import torch
import torch.nn.functional as F
from encoder_maps import cast, image, random_maps, trained
from model_checks import check_saved_and_loaded_equal
from tiny_encoders import CASES

from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.encoder_fusion_plans import FusionPlan
from vitweave.modeling.encoder_fusion.mixture_of_resolution import MixtureOfResolutionAdapter, MixtureOfResolutionFusion
from vitweave.modeling.encoder_fusion.registry import build_encoder_fusion
from vitweave.modeling.modeling_multi_encoder import MultiEncoderModel

CHANNELS, FAST = (32, 48), (4, 6)
SLOW = [(4, 6), (2, 3), (8, 12)]
PAPER = {"gate": "vector", "gate_input": "branches", "projects": "slow"}
every_grid = pytest.mark.parametrize("slow", SLOW, ids=str)
every_form = pytest.mark.parametrize("options", [{}, PAPER], ids=["code", "paper"])


def build(slow, dtype=torch.float32, **options):
    """A fusion whose parameters have moved, with one adapter, and maps for it."""
    torch.manual_seed(0)
    fusion = MixtureOfResolutionFusion(CHANNELS, [FAST, slow], adapter_layers=[1], **options)
    return trained(fusion).to(dtype), random_maps(CHANNELS, [FAST, slow], dtype=dtype)


def run(fusion, features):
    """The tokens of maps that go through the adapter and the final alignment."""
    fast = fusion.injections(features.maps[1])[1](features.maps[0])
    return fusion(type(features)([fast, features.maps[1]]))


def aligned(slow, grid):
    if slow.shape[2] > grid[0]:
        return F.avg_pool2d(slow, slow.shape[2] // grid[0])
    return F.interpolate(slow, size=grid, mode="bilinear", align_corners=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_grid
def test_a_fresh_adapter_returns_the_fast_map(slow, dtype):
    adapter, maps = (
        MixtureOfResolutionAdapter(*CHANNELS).to(dtype),
        random_maps(CHANNELS, [FAST, slow], dtype=dtype).maps,
    )
    assert torch.equal(adapter(*maps), maps[0])
    assert adapter.fast_conv.weight.any() and adapter.slow_conv.weight.any() and adapter.gate.fc1.bias.any()


@every_form
@every_grid
def test_the_formula(slow, options):
    fusion, features = build(slow, torch.float64, **options)
    adapter, (fast, high) = fusion.adapters[0], features.maps
    low = adapter.fast_proj(
        F.gelu(F.conv2d(fast, adapter.fast_conv.weight, adapter.fast_conv.bias, padding=3, groups=32))
    )
    high = aligned(adapter.slow_proj(F.gelu(adapter.slow_conv(high))), FAST)
    pooled = torch.cat([low if options else fast + low, high], dim=1).flatten(2).mean(dim=2)
    gate = torch.tanh(adapter.gate.fc2(F.gelu(adapter.gate.fc1(pooled))))
    assert gate.shape == (2, 32 if options else 1)
    expected = fast + low + gate[:, :, None, None] * high
    torch.testing.assert_close(adapter(*features.maps), expected)
    tokens = expected.flatten(2).transpose(1, 2)
    detail = fusion.slow_proj(aligned(features.maps[1], FAST).flatten(2).transpose(1, 2))
    final = tokens + detail if options else fusion.fast_proj(tokens) + detail
    torch.testing.assert_close(run(fusion, features), final)


@every_form
@every_grid
def test_every_parameter_and_both_maps_get_a_gradient(slow, options):
    fusion, features = build(slow, **options)
    for feature_map in features.maps:
        feature_map.requires_grad_()
    fused = run(fusion, features)
    (fused * torch.randn_like(fused)).sum().backward()
    assert not [n for n, p in fusion.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(feature_map.grad.any() for feature_map in features.maps)


def test_the_projections_of_a_fresh_adapter_move_first():
    adapter, maps = MixtureOfResolutionAdapter(*CHANNELS), random_maps(CHANNELS, [FAST, SLOW[0]]).maps
    moved = []
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        adapter(*maps).square().mean().backward()
        moved.append({n.rpartition(".")[0] for n, p in adapter.named_parameters() if p.grad.any()})
        optimizer.step()
    assert moved[0] == {"fast_proj", "slow_proj"}
    assert moved[2] == {"fast_proj", "slow_proj", "fast_conv", "slow_conv", "gate.fc1", "gate.fc2"}


@every_grid
def test_one_graph_half_precision_and_images_apart(slow):
    fusion, features = build(slow)
    torch.compiler.reset()
    compiled = torch.compile(lambda maps: run(fusion, maps), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features), run(fusion, features))
    low, maps = build(slow, torch.bfloat16)
    fused, precise = run(low, maps), run(low.float(), cast(maps, torch.float32))
    assert fused.dtype == torch.bfloat16 and (fused.float() - precise).norm() < 0.03 * precise.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = run(fusion, features)
    assert (fused.float() - run(fusion, features)).norm() < 0.03 * fused.norm()
    fusion, features = build(slow, torch.float64)
    torch.testing.assert_close(run(fusion, image(features, 1)), run(fusion, features)[1:])


def test_the_plan_and_its_refusals():
    fusion = build_encoder_fusion("mixture_of_resolution", CHANNELS, [FAST, (2, 3)])
    assert fusion.plan == FusionPlan(32, 24, FAST) and fusion.plan_for([(8, 8), (4, 4)]).num_tokens == 64
    assert list(fusion.injections(torch.zeros(1, 48, 2, 3))) == [6, 12, 18]
    for slow in ((3, 3), (2, 12), (16, 16)):
        with pytest.raises(
            ValueError, match=r"slow grid of .* height among \[1, 2, 4\] and a width among \[1, 2, 3, 6\]"
        ):
            build_encoder_fusion("mixture_of_resolution", CHANNELS, [FAST, slow])
    with pytest.raises(ValueError, match="expected two encoders"):
        build_encoder_fusion("mixture_of_resolution", [32, 48, 8], [FAST] * 3)
    with pytest.raises(ValueError, match="hidden_size to be None or the 32 channels of encoder 0"):
        build_encoder_fusion("mixture_of_resolution", CHANNELS, [FAST, FAST], 64)
    with pytest.raises(ValueError, match=r"different numbers of blocks, 1 or more, got \[1, 1\]"):
        build_encoder_fusion("mixture_of_resolution", CHANNELS, [FAST, FAST], options={"adapter_layers": [1, 1]})
    for option in ("gate", "gate_input", "projects"):
        with pytest.raises(ValueError, match=f"expected {option} to be one of .* got 'no'"):
            build_encoder_fusion("mixture_of_resolution", CHANNELS, [FAST, FAST], options={option: "no"})


ENCODERS = [
    {"model_type": "clip_vision_model", **CASES["clip_vision_model"]},
    {"model_type": "convnext", **CASES["convnext"]},
]


def tower(**options):
    return MultiEncoderConfig(
        encoder_configs=ENCODERS,
        encoder_options=[{"class_token": "drop_before", "image_size": 32}, {}],
        image_size=128,
        fusion_type="mixture_of_resolution",
        fusion_options=options,
    )


PIXELS = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))


def test_a_fresh_tower_is_its_fast_path_and_trained_adapters_act_between_the_blocks(tmp_path):
    torch.manual_seed(0)
    model = MultiEncoderModel(tower(adapter_layers=[1, 2])).eval()
    first_stage = MultiEncoderModel(tower(adapter_layers=[])).eval()
    left_out = first_stage.load_state_dict(model.state_dict(), strict=False)
    assert {name.split(".")[1] for name in left_out.unexpected_keys} == {"adapters"} and not left_out.missing_keys
    fresh = model(PIXELS).last_hidden_state
    assert fresh.shape == (2, model.config.num_tokens, model.config.fused_size) == (2, 16, 32)
    assert torch.equal(fresh, first_stage(PIXELS).last_hidden_state)
    for adapter in model.fusion.adapters:
        assert not adapter.slow_proj.weight.any() and not adapter.fast_proj.weight.any()
    limit = 32**-0.5  # of torch's own start; the one of transformers is narrower
    assert model.fusion.fast_proj.weight.abs().max() > 0.8 * limit and model.fusion.fast_proj.bias.any()
    trained(model.fusion.adapters)
    assert not torch.allclose(model(PIXELS).last_hidden_state, fresh, atol=0.01)
    loaded = check_saved_and_loaded_equal(model, tmp_path).eval()
    assert torch.equal(loaded(PIXELS).last_hidden_state, model(PIXELS).last_hidden_state)


def test_adapters_that_a_checkpoint_lacks_start_as_the_identity(tmp_path):
    first_stage = MultiEncoderModel(tower(adapter_layers=[])).eval()
    first_stage.save_pretrained(tmp_path)
    model, info = MultiEncoderModel.from_pretrained(
        tmp_path, config=tower(adapter_layers=[2]), output_loading_info=True
    )
    assert info["missing_keys"] and all(".adapters." in name for name in info["missing_keys"])
    assert torch.equal(model.eval()(PIXELS).last_hidden_state, first_stage(PIXELS).last_hidden_state)
    assert model.fusion.adapters[0].gate.fc1.bias.any()


def test_image_sizes_that_do_not_fit_are_refused_by_the_config():
    with pytest.raises(ValueError, match="slow grid of 3x3 and a fast one of 4x4: choose an image size for encoder 1"):
        MultiEncoderConfig.from_dict(tower().to_dict() | {"image_size": 96})

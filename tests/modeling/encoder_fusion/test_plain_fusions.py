"""What holds for the fusions that need nothing but maps: plans, gradients, one graph, types, batches, starts."""

import copy
import pickle

import pytest
import torch
from encoder_maps import cast, image, random_maps, trained
from torch import nn
from transformers import PreTrainedConfig

from vitweave.configuration.encoder_fusion_plans import FUSION_PLANS
from vitweave.configuration.encoder_fusion_plans import RESIZES as RESIZE_NAMES
from vitweave.modeling.encoder_fusion.base import EncoderMaps
from vitweave.modeling.encoder_fusion.registry import build_encoder_fusion
from vitweave.modeling.grid_matching import RESIZES
from vitweave.modeling.pretrained import VitweavePreTrainedModel

SAME = ((4, 6), (4, 6), (8, 3))  # as many cells in all
MIXED = ((4, 6), (8, 3), (2, 12))
CHANNELS = (32, 48, 64)
# name, hidden size, options, grids
CASES = [
    ("sequence_concat", None, {}, SAME),
    ("sequence_concat", 40, {"projector": ["linear", "se_mlp", "mlp2x_gelu"]}, SAME),
    ("sequence_concat", 40, {"order": "append", "num_prefixes": [1, 0, 5]}, MIXED),
    ("channel_concat", None, {}, MIXED),
    ("channel_concat", 40, {"grid": 5, "resize": "bilinear"}, MIXED),
    ("channel_concat", None, {"projector": "linear", "grid": (4, 3), "resize": "align_ac"}, MIXED),
    ("channel_concat", None, {"grid": (2, 3), "resize": "avg_pool"}, ((4, 6), (2, 3), (8, 12))),
    ("add", None, {}, MIXED),
    ("add", 40, {"resize": "bilinear", "direct": True}, MIXED),
    ("deformable", None, {}, MIXED),
    ("deformable", 40, {"num_heads": 4, "num_points": 2}, MIXED),
]
every_case = pytest.mark.parametrize(
    ("name", "hidden_size", "options", "grids"), CASES, ids=[f"{n}-{h}-{list(o)}" for n, h, o, _ in CASES]
)


def build(name, hidden_size, options, grids, dtype=torch.float32):
    """A fusion whose parameters have moved, and maps for it."""
    torch.manual_seed(0)
    fusion = trained(build_encoder_fusion(name, CHANNELS, grids, hidden_size, options)).to(dtype)
    return fusion, random_maps(CHANNELS, grids, options.get("num_prefixes"), dtype=dtype)


@every_case
def test_the_output_is_as_planned(name, hidden_size, options, grids):
    fusion, features = build(name, hidden_size, options, grids)
    fused = fusion(features)
    assert fused.shape == (2, fusion.num_tokens, fusion.hidden_size) and torch.isfinite(fused).all()
    assert fusion.plan == FUSION_PLANS[name](CHANNELS, grids, hidden_size, **options)
    assert hidden_size in (None, fusion.hidden_size)
    assert fusion.keeps_grid == (name != "sequence_concat")
    assert not fusion.keeps_grid or fusion.num_tokens == fusion.plan.grid[0] * fusion.plan.grid[1]


@every_case
def test_images_of_another_size_follow_their_plan(name, hidden_size, options, grids):
    fusion, _ = build(name, hidden_size, options, grids)
    larger = [(2 * height, 2 * width) for height, width in grids]
    plan = fusion.plan_for(larger)
    fused = fusion(random_maps(CHANNELS, larger, options.get("num_prefixes"), batch=1))
    assert fused.shape == (1, plan.num_tokens, plan.hidden_size)


@every_case
def test_every_parameter_and_every_map_gets_a_gradient(name, hidden_size, options, grids):
    fusion, features = build(name, hidden_size, options, grids)
    given = [feature_map.requires_grad_() for feature_map in features.maps]
    given += [prefix.requires_grad_() for prefix in features.prefixes if prefix is not None]
    fused = fusion(features)
    (fused * torch.randn_like(fused)).sum().backward()
    assert not [n for n, p in fusion.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(tensor.grad.any() for tensor in given)


@every_case
def test_images_do_not_see_each_other(name, hidden_size, options, grids):
    fusion, features = build(name, hidden_size, options, grids, torch.float64)
    torch.testing.assert_close(fusion(image(features, 1)), fusion(features)[1:])


@every_case
def test_compiles_to_one_graph(name, hidden_size, options, grids):
    torch.compiler.reset()
    fusion, features = build(name, hidden_size, options, grids)
    compiled = torch.compile(fusion, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features), fusion(features))


class FromTensors(nn.Module):
    """A fusion that takes plain lists, for torch.export."""

    def __init__(self, fusion):
        super().__init__()
        self.fusion = fusion

    def forward(self, maps, prefixes):
        return self.fusion(EncoderMaps(maps, prefixes))


@pytest.mark.slow
@every_case
def test_exports_with_any_batch_size(name, hidden_size, options, grids):
    fusion, features = build(name, hidden_size, options, grids)
    batch = torch.export.Dim("batch", min=1, max=64)
    sizes = tuple([None if t is None else {0: batch} for t in part] for part in (features.maps, features.prefixes))
    program = torch.export.export(FromTensors(fusion), (features.maps, features.prefixes), dynamic_shapes=sizes)
    other = random_maps(CHANNELS, grids, options.get("num_prefixes"), batch=5, seed=3)
    torch.testing.assert_close(program.module()(other.maps, other.prefixes), fusion(other), rtol=1e-4, atol=1e-4)


@every_case
def test_bfloat16_comes_close_to_float32(name, hidden_size, options, grids):
    fusion, features = build(name, hidden_size, options, grids, torch.bfloat16)
    low = fusion(features)
    precise = fusion.float()(cast(features, torch.float32))
    assert low.dtype == torch.bfloat16
    assert (low.float() - precise).norm() < 0.03 * precise.norm()


@every_case
def test_fusions_can_be_copied_and_sent(name, hidden_size, options, grids):
    fusion, features = build(name, hidden_size, options, grids)
    for other in (copy.deepcopy(fusion), pickle.loads(pickle.dumps(fusion))):
        assert torch.equal(other(features), fusion(features)) and other.plan_for(grids) == fusion.plan


class HostConfig(PreTrainedConfig):
    model_type = "encoder_fusion_host"


class Host(VitweavePreTrainedModel):
    """The smallest model around a fusion."""

    config_class = HostConfig

    def __init__(self, config: HostConfig):
        super().__init__(config)
        self.fusion = build_encoder_fusion(config.fusion, CHANNELS, config.grids, config.hidden, config.options)
        self.post_init()


@every_case
def test_start_values_survive_a_model_around_the_fusion(name, hidden_size, options, grids):
    host = Host(HostConfig(fusion=name, options=options, grids=grids, hidden=hidden_size))
    alone = build_encoder_fusion(name, CHANNELS, grids, hidden_size, options)
    special = {n for n, module in alone.named_modules() if hasattr(module, "set_start_values")}
    for module_name in special:
        for key, value in alone.get_submodule(module_name).named_parameters():
            assert torch.equal(host.fusion.get_parameter(f"{module_name}.{key}"), value)
    assert bool(special) == (name == "deformable" or (name == "add" and not options.get("direct")))


def test_resizes_have_the_same_names_in_configs():
    assert sorted(RESIZES) == sorted(RESIZE_NAMES)


@pytest.mark.parametrize("name", ["add", "channel_concat", "deformable", "sequence_concat"])
def test_misspelt_options_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"the encoder fusion '{name}' has no option 'resise'"):
        build_encoder_fusion(name, [32, 32], [(2, 2), (2, 2)], options={"resise": 1})
    with pytest.raises(TypeError, match="resise"):
        FUSION_PLANS[name]([32, 32], [(2, 2), (2, 2)], None, resise=1)

"""What holds for every layer fusion: a table over the registry, so that a new fusion is covered by being registered.

`VARIANTS` lists, by name, the options under which a fusion is tried besides its defaults.
"""

from dataclasses import fields, replace

import pytest
import torch
from fusion_tokens import random_tokens, trained
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from vitweave.modeling.layer_fusion.base import FusedTokens, LayerFusion, LayerTokens
from vitweave.modeling.layer_fusion.registry import LAYER_FUSIONS, build_layer_fusion
from vitweave.modeling.pretrained import VitweavePreTrainedModel

HIDDEN, LAYERS = 32, 3
FILE = "model.safetensors"

VARIANTS: dict[str, list[dict]] = {
    "aspp": [{"map_norm": "batch", "rates": [1, 9]}],
    "attentive_probe": [{"num_heads": 2, "query": "cls"}],
    "concat": [
        {"dense": True, "include_mean_patch": True},
        {"connector": "sti"},
        {"connector": "sci", "dense": True},
        {"connector": "dci", "dense": True},
    ],
    "cross_layer_attention": [
        {"num_heads": 4, "mlp_ratio": 0},
        {"num_heads": 4, "query": "learned", "num_queries": 3, "layers_as": "per_layer"},
        {"num_heads": 4, "dense": True},
        {"num_heads": 4, "folded": False, "layers_as": "per_layer"},
    ],
    "efficient_attention": [{"groups": 4}, {"attention": "linear", "num_heads": 2}],
    "fpn": [
        {"style": "last", "out_channels": 8, "extra_level": True},
        {"style": "dpt", "out_channels": 8},
        {"style": "dpt", "out_channels": 8, "cls_readout": "ignore"},
    ],
    "gated_sum": [{"granularity": "channel"}, {"gate": "sigmoid"}],
    "graph": [
        {"conv": "gatv2", "edges": "learned", "num_heads": 2, "mean_nodes": True, "layer_embedding": True},
        {"conv": "gcn", "edges": "chain", "readout": "mean", "depth": 2},
        {"edges": "star", "num_heads": 2, "head_merge": "mean"},
    ],
    "layer_self_attention": [
        {"num_heads": 4, "depth": 2, "readout": "last", "reads": "cls+mean"},
        {"num_heads": 4, "readout": "mean", "norm_first": False},
    ],
    "recurrent": [
        {"cell": "lstm", "on": "mean", "bidirectional": True, "depth": 2, "cell_size": 8},
        {"cell": "rnn", "on": "patches", "cell_size": 8},
    ],
    "weighted_sum": [{"dense": True}, {"normalisation": "fast", "dense": True}, {"normalisation": "sum"}],
}
# gradients that are exactly zero by construction
NO_GRADIENT: dict[str, tuple[str, ...]] = {}

CASES = [(name, options) for name in sorted(LAYER_FUSIONS) for options in [{}, *VARIANTS.get(name, [])]]
every_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{n}-" + "-".join(f"{k}={v}" for k, v in o.items()) for n, o in CASES]
)
every_fusion = pytest.mark.parametrize("name", sorted(LAYER_FUSIONS))


def build(name: str, options: dict, layers: int = LAYERS) -> LayerFusion:
    torch.manual_seed(0)
    return build_layer_fusion(name, layers, HIDDEN, options)


def outputs_of(fused: FusedTokens) -> dict[str, torch.Tensor]:
    """Every tensor of the output by name, maps one by one."""
    found = {}
    for field in fields(fused):
        value = getattr(fused, field.name)
        parts = value if isinstance(value, tuple) else (value,)
        found |= {f"{field.name}.{index}": part for index, part in enumerate(parts) if part is not None}
    return found


def assert_same(actual: FusedTokens, expected: FusedTokens, rtol: float = 1e-5, atol: float = 1e-5):
    actual, expected = outputs_of(actual), outputs_of(expected)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@every_case
def test_a_new_fusion_changes_nothing(name, options, training, dtype):
    fusion = build(name, options).to(dtype).train(training)
    tokens = random_tokens(dtype=dtype)
    fused = fusion(tokens)
    assert torch.equal(fused.pooled, tokens.base_cls)
    assert fused.patches is None or torch.equal(fused.patches, tokens.base_patches)
    assert fused.pooled.dtype == dtype


def loss_of(fusion: LayerFusion, tokens: LayerTokens) -> torch.Tensor:
    """A loss that every output takes part in, against fixed random targets."""
    generator = torch.Generator().manual_seed(7)
    parts = [v for n, v in outputs_of(fusion(tokens)).items() if not n.startswith(("layer_weights", "attentions"))]
    return sum((part * torch.randn(part.shape, generator=generator)).sum() for part in parts)


@every_case
def test_gamma_moves_first_and_then_everything_gets_a_gradient(name, options):
    fusion, tokens = build(name, options), random_tokens()
    optimizer = torch.optim.SGD(fusion.parameters(), lr=0.1)
    # what lies in front of a layer that starts at zero waits one step longer
    steps = 3 if any(isinstance(m, nn.Linear) and not m.weight.any() for m in fusion.modules()) else 2
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(fusion, tokens).backward()
        optimizer.step()
        if step == 0:
            gammas = [p for n, p in fusion.named_parameters() if "gamma_" in n]
            assert gammas and all(gamma.any() for gamma in gammas)
    silent = [n for n, p in fusion.named_parameters() if p.grad is None or not p.grad.any()]
    assert sorted(silent) == sorted(NO_GRADIENT.get(name, ()))


@every_case
def test_masked_patches_change_nothing(name, options):
    fusion = trained(build(name, options)).double().eval()  # deep pyramids lose digits
    mask = torch.ones(2, 15, dtype=torch.bool)
    tokens = random_tokens(dtype=torch.float64)
    assert_same(fusion(replace(tokens, patch_mask=mask)), fusion(tokens))
    mask[0, 4:9], mask[1, 0] = False, False
    masked = replace(tokens, patch_mask=mask)
    other = replace(
        masked,
        patches=tokens.patches.masked_fill(~mask[:, None, :, None], 50.0),
        base_patches=tokens.base_patches.masked_fill(~mask[..., None], 50.0),
    )
    before, after = fusion(masked), fusion(other)
    torch.testing.assert_close(before.pooled, after.pooled)
    if before.patches is not None:
        torch.testing.assert_close(before.patches[mask], after.patches[mask])


@pytest.mark.parametrize(
    ("batch", "layers", "grid"), [(1, 1, (4, 4)), (1, 3, (5, 7)), (2, 2, (2, 9)), (3, 4, (3, 2))], ids=str
)
@every_case
def test_any_grid_batch_and_number_of_layers(name, options, batch, layers, grid):
    fusion = trained(build(name, options, layers)).train()
    tokens = random_tokens(batch, layers, HIDDEN, grid)
    fused = fusion(tokens)
    assert fused.pooled.shape == tokens.base_cls.shape
    assert fused.patches is None or fused.patches.shape == tokens.base_patches.shape
    assert all(torch.isfinite(value).all() for value in outputs_of(fused).values())
    loss_of(fusion, tokens).backward()


@every_case
def test_images_do_not_see_each_other(name, options):
    fusion, tokens = trained(build(name, options)).double().eval(), random_tokens(dtype=torch.float64)
    together = outputs_of(fusion(tokens))
    alone = outputs_of(fusion(random_slice(tokens)))
    for output, value in alone.items():
        if len(value) == 1:
            torch.testing.assert_close(value, together[output][1:], rtol=1e-5, atol=1e-5)


def random_slice(tokens: LayerTokens) -> LayerTokens:
    """The last image of a batch."""
    return replace(
        tokens,
        cls=tokens.cls[1:],
        patches=tokens.patches[1:],
        base_cls=tokens.base_cls[1:],
        base_patches=tokens.base_patches[1:],
    )


@every_case
def test_the_fusion_says_what_it_needs(name, options):
    fusion, tokens = trained(build(name, options)).eval(), random_tokens()
    fused = fusion(tokens)
    given = {"patches": tokens.patches, "cls": tokens.cls, "patch_means": tokens.mean_patches()}
    assert fusion.needs <= given.keys()
    if "patches" not in fusion.needs:
        assert fused.patches is None
        bare = replace(tokens, patches=None, base_patches=None)
        if "patch_means" in fusion.needs:
            bare = replace(bare, patch_means=tokens.mean_patches())
        assert_same(fusion(bare), fused)
    if "cls" not in fusion.needs:
        assert_same(fusion(replace(tokens, cls=None)), fused)


@every_case
def test_the_direct_form_has_no_gammas_and_shows_the_layers_at_once(name, options):
    fusion, tokens = trained(build(name, options)), random_tokens()
    direct = build(name, {**options, "direct": True})
    assert direct.state_dict().keys() == {n for n in fusion.state_dict() if "gamma_" not in n}
    direct.load_state_dict(fusion.state_dict(), strict=False)
    other = replace(tokens, cls=tokens.cls.flip(2), patches=tokens.patches.flip(3))
    assert not torch.allclose(direct(tokens).pooled, fusion(tokens).pooled, atol=0.05)
    assert not torch.allclose(direct(tokens).pooled, direct(other).pooled, atol=0.05)


@every_case
def test_the_fusion_says_which_maps_it_gives(name, options):
    fusion, tokens = build(name, options), random_tokens()
    fused = fusion(tokens)
    maps = fused.feature_maps or (() if fused.patches is None else (fused.patches.transpose(1, 2),))
    assert fusion.map_channels == tuple(feature_map.shape[1] for feature_map in maps)


@every_case
def test_every_norm_is_taken(name, options):
    for norm in ("none", "shared", "per_layer"):
        fusion = trained(build(name, {**options, "norm": norm}))
        assert torch.isfinite(fusion(random_tokens()).pooled).all()
    with pytest.raises(ValueError, match="norm to be one of"):
        build(name, {**options, "norm": "batch"})


@every_fusion
def test_bad_options_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"the layer fusion '{name}' has no option 'dens_e'"):
        build(name, {"dens_e": True})
    with pytest.raises(ValueError, match="at least one layer"):
        build(name, {}, layers=0)


def test_an_unknown_fusion_is_refused_by_name():
    with pytest.raises(ValueError, match=r"unknown fusion_type 'weighted_sun' \(did you mean 'weighted_sum'"):
        build_layer_fusion("weighted_sun", 2, 8)


class HostConfig(PreTrainedConfig):
    model_type = "fusion_host"


class Host(VitweavePreTrainedModel):
    """The smallest model around a fusion."""

    config_class = HostConfig

    def __init__(self, config: HostConfig):
        super().__init__(config)
        self.fusion = build(config.fusion, config.options)
        self.other = nn.Linear(2, 2)
        self.post_init()


@every_case
def test_start_values_survive_a_model_around_the_fusion(name, options, tmp_path):
    tokens, config = random_tokens(), HostConfig(fusion=name, options=options)
    host = Host(config)
    save_file({"other.weight": host.other.weight.detach(), "other.bias": host.other.bias.detach()}, tmp_path / FILE)
    config.save_pretrained(tmp_path)
    loaded, info = Host.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {f"fusion.{key}" for key in host.fusion.state_dict()}
    for model in (host, loaded):
        assert torch.equal(model.fusion(tokens).pooled, tokens.base_cls)
        with_start = [module for module in model.modules() if hasattr(module, "set_start_values")]
        assert with_start
        for module in with_start:  # setting them again changes only what is drawn at random
            before = {n: p.clone() for n, p in module.named_parameters(recurse=False)}
            torch.manual_seed(3)
            for parameter in module.parameters(recurse=False):
                parameter.__dict__.pop("_is_hf_initialized", None)
            module.set_start_values()
            for n, p in module.named_parameters(recurse=False):
                assert torch.equal(p, before[n]) or 0.5 < p.std() / before[n].std() < 2, n


@every_case
def test_adapters_on_any_projection_are_trained(name, options):
    fusion = trained(build(name, options))
    targets = [n for n, module in fusion.named_modules() if isinstance(module, nn.Linear)]
    if not targets:
        pytest.skip("no linear layer")
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted = inject_adapter_in_model(config, fusion)
    loss_of(adapted, random_tokens()).backward()
    found = {n: p.grad for n, p in adapted.named_parameters() if "lora_" in n}
    assert len(found) == 2 * len(targets)
    assert not [n for n, grad in found.items() if grad is None or not grad.any()]


def example_macs(c: int = 768, n: int = 196, layers: int = 4) -> dict[str, list[tuple[dict, float]]]:
    """Multiplications per image by the cost formulas of the methods, at ViT-B/16's size, C = 768, N = 196, L = 4."""
    heads, mlp, k = c // 64, 2 * 4 * c * c, c // 32
    reduced, mid, out, size = 256, 128, 256, 256
    return {
        "aspp": [({}, n * (layers * c * reduced + reduced * mid * (1 + 9 * 3) + 5 * mid * c) + reduced * mid + c * c)],
        "attentive_probe": [({}, 2 * layers * 4 * c * c + 4 * c * c)],
        "concat": [({}, layers * c * c), ({"dense": True}, (n + 1) * layers * c * c)],
        "cross_layer_attention": [
            ({}, 2 * layers * n * c * heads + 4 * c * c + mlp),
            ({"mlp_ratio": 0, "folded": False}, 2 * layers * n * c * c + 2 * c * c),
        ],
        "efficient_attention": [
            ({}, n * c * (9 * k + 2 + layers) + c * c),
            ({"attention": "linear"}, n * c * c * (4 + 2 / heads)),
        ],
        "film": [({}, c * c // 4 + c // 4 * 2 * layers * c + c * c + layers * n * c)],
        "fpn": [({}, 5.25 * n * (c * out + 9 * out**2) + n * 4 * c * c + 3 * out * c)],
        "gated_sum": [({}, layers * c * c // 4)],
        "graph": [({}, layers * c * c + layers**2 * c + c * c), ({"conv": "gatv2"}, (2 * layers + 1) * c * c)],
        "layer_self_attention": [({}, (layers + 1) * 12 * c * c)],
        "recurrent": [({}, layers * 3 * (c * size + size**2) + size * c)],
        "weighted_sum": [({}, layers * c), ({"dense": True}, layers * c * (n + 1))],
    }


EXAMPLES = [(name, options, macs) for name, rows in example_macs().items() for options, macs in rows]


@pytest.mark.parametrize(("name", "options", "macs"), EXAMPLES, ids=[f"{n}-{o}" for n, o, _ in EXAMPLES])
def test_costs_what_the_formula_says(name, options, macs):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        fusion = build_layer_fusion(name, 4, 768, options)
        tokens = LayerTokens(
            torch.empty(1, 4, 768), torch.empty(1, 4, 196, 768), (14, 14), torch.empty(1, 768), torch.empty(1, 196, 768)
        )
        fusion(tokens)
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=0.03)


def test_every_fusion_has_a_cost():
    assert example_macs().keys() == LAYER_FUSIONS.keys()


class FromTensors(nn.Module):
    """A fusion that takes and gives plain tensors, for torch.export."""

    def __init__(self, fusion: LayerFusion, grid: tuple[int, int]):
        super().__init__()
        self.fusion, self.grid = fusion, grid

    def forward(self, cls, patches, base_cls, base_patches):
        return outputs_of(self.fusion(LayerTokens(cls, patches, self.grid, base_cls, base_patches)))


def tensors_of(tokens: LayerTokens) -> tuple[torch.Tensor, ...]:
    return tokens.cls, tokens.patches, tokens.base_cls, tokens.base_patches


@pytest.mark.slow
@every_case
def test_compiles_to_one_graph(name, options):
    torch.compiler.reset()
    fusion, tokens = trained(build(name, options)).double().eval(), random_tokens(dtype=torch.float64)
    compiled = torch.compile(fusion, fullgraph=True, backend="aot_eager")
    assert_same(compiled(tokens), fusion(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@every_case
def test_exports_with_any_batch_size(name, options):
    fusion = FromTensors(trained(build(name, options)).eval(), grid=(3, 5))
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(fusion, tensors_of(random_tokens()), dynamic_shapes=(batch,) * 4)
    given = tensors_of(random_tokens(batch=5, seed=3))
    expected = fusion(*given)
    for output, value in program.module()(*given).items():
        torch.testing.assert_close(value, expected[output], rtol=1e-4, atol=1e-4)

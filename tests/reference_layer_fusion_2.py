"""Replays the reference vectors of the layer fusions over grids and of the recurrent and graph ones.

`KINDS` maps a sidecar's kind to its replay; sizes and options come from the sidecar and the stored tensors.
"""

import re

import torch
from torch import Tensor, nn

from vitweave.modeling.dpt_neck import DptNeck
from vitweave.modeling.graph_convs import NEGATIVE_SLOPE, GraphAttention, GraphAttentionV2, GraphConv
from vitweave.modeling.layer_fusion.aspp import Aspp, AsppFusion
from vitweave.modeling.layer_fusion.base import FusedTokens, LayerFusion, LayerTokens
from vitweave.modeling.layer_fusion.efficient_attention import EfficientAttentionFusion, MultiScaleAttention
from vitweave.modeling.layer_fusion.fpn import FpnFusion
from vitweave.modeling.layer_fusion.graph import GraphFusion
from vitweave.modeling.layer_fusion.recurrent import GATES, Cells, RecurrentFusion
from vitweave.modeling.pyramids import FeaturePyramid, SimpleFeaturePyramid, coarser_level


def translated(state: dict[str, Tensor], renames: dict[str, str]) -> dict[str, Tensor]:
    """The state under our names: every pattern is replaced, in order."""
    for pattern, name in renames.items():
        state = {re.sub(pattern, name, key): tensor for key, tensor in state.items()}
    return state


def loaded(case, module: nn.Module, renames: dict[str, str], prefix: str = "state") -> nn.Module:
    """The module with the stored weights, in the dtype under test."""
    module.load_state_dict(translated(case.group(prefix), renames), strict=True)
    return module.to(case.dtype).eval()


def check_all(case, produced: dict[str, Tensor]):
    """Every stored output is produced and agrees."""
    wanted = case.group("output")
    assert wanted.keys() == produced.keys()
    for name, value in produced.items():
        assert value.shape == wanted[name].shape, name
        case.check(f"output.{name}", value)


# Published modules ----------------------------------------------------------------------------------------------------


def replay_ema(case):
    attention = MultiScaleAttention(case.config["channels"], case.config["factor"])
    attention = loaded(case, attention, {r"^gn\.": "norm."})
    check_all(case, {"y": attention(case.tensors["input.x"], None)})


def replay_aspp_torchvision(case):
    facts = case.config
    out, rates = facts["out_channels"], facts["atrous_rates"]
    pooling = f"^convs\\.{len(rates) + 1}"
    renames = {f"{pooling}\\.1": "pooling.conv", f"{pooling}\\.2": "pooling.norm"}
    renames |= {r"^convs\.(\d+)\.0": r"branches.\1.conv", r"^convs\.(\d+)\.1": r"branches.\1.norm"}
    renames |= {r"^project\.0": "project.conv", r"^project\.1": "project.norm"}
    aspp = loaded(case, Aspp(facts["in_channels"], out, out, rates, map_norm="batch"), renames)
    check_all(case, {"y": aspp(case.tensors["input.x"])})


def replay_fpn_torchvision(case):
    pyramid = FeaturePyramid(case.config["in_channels_list"], case.config["out_channels"])
    renames = {r"^inner_blocks\.(\d+)\.0": r"lateral.\1", r"^layer_blocks\.(\d+)\.0": r"output.\1"}
    maps = case.group("input")
    levels = loaded(case, pyramid, renames)([maps[f"p{k}"] for k in range(len(maps))], [None] * len(maps))
    check_all(case, {f"p{k}": level for k, level in enumerate(levels)} | {"pool": coarser_level(levels[-1])})


def replay_simple_pyramid(case):
    facts = case.config
    pyramid = SimpleFeaturePyramid(facts["dim"], facts["out_channels"], facts["scale_factors"])
    names, renames = case.group("state"), {}
    stages = sorted({int(re.match(r"simfp_(\d+)", name)[1]) for name in names})
    for level, stage in enumerate(stages):  # the last two parts of a stage are its 1x1 and 3x3 convolutions
        parts = sorted({int(re.match(rf"simfp_{stage}\.(\d+)", n)[1]) for n in names if f"simfp_{stage}." in n})
        for part, role in zip(parts[-2:], ("lateral", "output"), strict=True):
            renames[rf"^simfp_{stage}\.{part}\.norm"] = f"{role}.{level}.1"
            renames[rf"^simfp_{stage}\.{part}\."] = f"{role}.{level}.0."
        renames[rf"^simfp_{stage}\."] = f"resample.{level}.doublings."
    levels, _ = loaded(case, pyramid, renames)(case.tensors["input.x"])
    produced = {f"p{stage}": level for stage, level in zip(stages, levels, strict=True)}
    check_all(case, produced | {f"p{stages[-1] + 1}": coarser_level(levels[-1])})


def replay_dpt_neck(case):
    facts = case.config
    sizes = facts["neck_hidden_sizes"]
    neck = DptNeck(
        [facts["hidden_size"]] * len(sizes),
        sizes,
        facts["fusion_hidden_size"],
        facts["reassemble_factors"],
        facts["readout_type"],
    )
    renames = {
        r"^reassemble_stage\.layers\.": "reassemble.",
        r"^convs\.": "laterals.",
        r"^fusion_stage\.layers\.": "refine.",
    }
    renames |= {r"^reassemble_stage\.readout_projects\.(\d+)\.0": r"reassemble.\1.readout"}
    renames |= {r"residual_layer1\.": "merge.", r"residual_layer2\.": "residual.", "convolution": "conv"}
    for name in [n for n in case.tensors if n.startswith("state.fusion_stage.layers.0.residual_layer1")]:
        del case.tensors[name]  # never run: the coarsest step has nothing to take in
    states = case.tensors["input.hidden_states"]
    maps = [state[:, 1:].transpose(1, 2).unflatten(2, facts["patch_grid"]) for state in states]
    levels = loaded(case, neck, renames)(maps, [state[:, 0] for state in states])
    produced = {f"fused{k}": level for k, level in enumerate(levels)}
    for name in produced:  # the deep sums cancel: float32 rounds at the scale of a map, in transformers' neck as here
        largest = case.tensors[f"output.{name}"].abs().max()
        produced[name], case.tensors[f"output.{name}"] = produced[name] / largest, case.group("output")[name] / largest
    check_all(case, produced)


TORCH_CELL = {
    r"weight_ih_l(\d+)": r"\1.forward_cell.input_proj.weight",
    r"bias_ih_l(\d+)": r"\1.forward_cell.input_proj.bias",
    r"weight_hh_l(\d+)": r"\1.forward_cell.state_proj.weight",
    r"bias_hh_l(\d+)": r"\1.forward_cell.state_proj.bias",
    r"forward_cell(.*)_reverse": r"backward_cell\1",
}


def replay_recurrent(case):
    facts, state = case.config, case.group("state")
    size, directions = facts["hidden_size"], 2 if facts.get("bidirectional") else 1
    cell = {count: name for name, count in GATES.items()}[len(state["bias_ih_l0"]) // size]
    widths = [facts["input_size"]] + [directions * size] * (facts.get("num_layers", 1) - 1)
    layers = nn.ModuleList(Cells(cell, width, size, directions == 2) for width in widths)
    states, produced, ends, memories = case.tensors["input.x"], {}, [], []
    for layer in loaded(case, layers, TORCH_CELL):
        for part in filter(None, (layer.forward_cell, layer.backward_cell)):
            part.step = remembering(part.step, memories)
        memories.clear()
        last, states = layer(states)
        ends += last.split(size, dim=-1)
    produced = {"y": states, "h_n": torch.stack(ends)}
    check_all(case, produced | ({"c_n": memories[-1][None]} if "output.c_n" in case.tensors else {}))


def remembering(step, memories: list[Tensor]):
    """The step of a cell, which also notes every memory."""

    def noted(*args):
        state, memory = step(*args)
        memories.append(memory)
        return state, memory

    return noted


def dense_adjacency(edges: Tensor, weights: Tensor, nodes: int) -> Tensor:
    """(nodes, nodes), [i, j] the weight of the edge j -> i; loops that are not listed weigh 1."""
    adjacency = weights.new_zeros(nodes, nodes)
    adjacency[edges[1], edges[0]] = weights
    loops = adjacency.diagonal()
    loops.copy_(torch.where(loops == 0, 1, loops))
    return adjacency


def replay_gcn(case):
    given = case.group("input")
    conv = GraphConv(*reversed(case.tensors["state.lin.weight"].shape))
    conv = loaded(case, conv, {r"^lin\.": "node_proj."})
    weights, nodes = given["edge_weight"], given["x"]
    for name, edge_weights in (("weighted", weights), ("unweighted", torch.ones_like(weights))):
        update, _ = conv(nodes[None], dense_adjacency(given["edge_index"], edge_weights, len(nodes)))
        case.check(f"output.{name}", update[0])
    assert case.group("output").keys() == {"weighted", "unweighted"}


def replay_graph_attention(case):
    facts, given = case.config, case.group("input")
    conv_class = {"gat": GraphAttention, "gatv2": GraphAttentionV2}[case.kind]
    width = facts["out_channels"] * (facts["heads"] if facts["concat"] else 1)
    conv = conv_class(facts["in_channels"], width, facts["heads"], facts["concat"])
    for name in [n for n in case.tensors if n.startswith("state.att")]:
        case.tensors[name] = case.tensors[name].squeeze(0)
    conv = loaded(case, conv, {r"^lin\.": "node_proj.", r"^lin_l": "source_proj", r"^lin_r": "target_proj"})
    edges, nodes = given["edge_index"], given["x"]
    update, weights = conv(nodes[None], dense_adjacency(edges, nodes.new_ones(edges.shape[1]), len(nodes)))
    sent, received = case.tensors["output.alpha_edge_index"]
    case.check("output.y", update[0])
    case.check("output.alpha", weights[0, received, sent])


# Whole fusions --------------------------------------------------------------------------------------------------------


def tokens_of(case) -> LayerTokens:
    given = case.group("input")
    grid = tuple(case.config.get("grid") or (1, given["patches"].shape[2]))
    cls, patches = given["cls"].transpose(0, 1), given["patches"].transpose(0, 1)
    return LayerTokens(cls, patches, grid, given["base_cls"], given["base_patches"])


def built(case, fusion_class: type[LayerFusion], **options) -> LayerFusion:
    layers, _, hidden = case.tensors["input.cls"].shape
    return fusion_class(layers, hidden, **options)


def run(case, fusion: LayerFusion) -> tuple[dict[str, Tensor], FusedTokens]:
    """The outputs under the names of the vectors: with the stored gammas, and in the direct form."""
    fused = fusion(tokens_of(case))
    produced = {"global": fused.pooled} | ({"patches": fused.patches} if fused.patches is not None else {})
    if "output.direct_global" in case.tensors:
        fusion.direct = True
        produced["direct_global"] = fusion(tokens_of(case)).pooled
    return produced, fused


def replay_ema_fusion(case):
    fusion = built(case, EfficientAttentionFusion, groups=case.config["groups"])
    fusion = loaded(case, fusion, {r"^ema\.gn": "attention.norm", r"^ema\.": "attention."})
    seen = {}
    fusion.attention.register_forward_hook(lambda m, given, y: seen.update(mixed_map=given[0], ema_map=y))
    check_all(case, run(case, fusion)[0] | seen)


def replay_aspp_fusion(case):
    facts, reduced = case.config, len(case.tensors["state.reduce.bias"])
    options = {"rates": facts["rates"], "mid_channels": facts["mid_channels"], "norm_groups": facts["gn_groups"]}
    renames = {f"^branches\\.{len(facts['rates']) + 1}\\.": "aspp.pooling.", r"^branches\.": "aspp.branches."}
    renames |= {
        r"^project\.weight": "aspp.project.conv.weight",
        r"^project\.gn": "aspp.project.norm",
        r"\.gn\.": ".norm.",
    }
    fusion = loaded(case, built(case, AsppFusion, reduced_channels=reduced, **options), renames)
    seen = {}
    fusion.aspp.register_forward_hook(lambda m, given, y: seen.update(reduced_map=given[0], aspp_map=y))
    check_all(case, run(case, fusion)[0] | seen)


def replay_fpn_fusion(case):
    facts = case.config
    chosen = facts["layer_of_level"]
    options = {"scales": facts["scale_of_level"], "layer_of_level": chosen, "out_channels": facts["out_channels"]}
    for name in [n for n in case.tensors if re.match(r"state\.norm_patch\.\d+\.", n)]:
        if int(name.split(".")[2]) not in chosen:
            del case.tensors[name]  # the norm of a layer that makes no level
    renames = {r"^resample\.(\d+)\.(\d+)\.": r"resample.\1.doublings.\2."}
    renames |= {r"^resample\.(\d+)\.(weight|bias)": r"resample.\1.doublings.0.\2"}
    renames |= {r"^(lateral|output)\.": r"pyramid.\1."}
    produced, fused = run(case, loaded(case, built(case, FpnFusion, **options), renames))
    check_all(case, produced | {f"p{k}": level for k, level in enumerate(fused.feature_maps)})


def replay_recurrent_fusion(case):
    fusion = built(case, RecurrentFusion, cell=case.config["cell"], cell_size=case.config["hidden"])
    fusion = loaded(case, fusion, {r"^(gru|lstm|rnn)\.": "cells."} | TORCH_CELL)
    seen = {}
    fusion.cells[-1].register_forward_hook(lambda m, given, y: seen.update(hidden=y[1]))
    check_all(case, run(case, fusion)[0] | seen)


def replay_graph_fusion(case):
    assert case.config["negative_slope"] == NEGATIVE_SLOPE and case.config["self_loops"]
    produced, renames = {}, {r"^gat\.lin": "convs.0.node_proj", r"^gat\.": "convs.0."}
    for edges in sorted({name.split(".")[1].split("_")[0] for name in case.tensors if name.startswith("output.")}):
        for readout in ("last", "mean"):
            fusion = built(case, GraphFusion, edges=edges, readout=readout, num_heads=case.config["heads"])
            fusion = loaded(case, fusion, renames)
            fused = fusion(tokens_of(case), output_attentions=True)
            produced[f"{edges}_{readout}_global"] = fused.pooled
        produced[f"{edges}_alpha"] = fused.attentions
        produced[f"{edges}_nodes"] = fusion.pass_messages(fusion.nodes(tokens_of(case)))[0]
    check_all(case, produced)


KINDS = {
    "aspp_torchvision": replay_aspp_torchvision,
    "dpt_neck": replay_dpt_neck,
    "ema": replay_ema,
    "fpn_torchvision": replay_fpn_torchvision,
    "fusion_aspp_fusion": replay_aspp_fusion,
    "fusion_ema_fusion": replay_ema_fusion,
    "fusion_fpn_fusion": replay_fpn_fusion,
    "fusion_graph_gat": replay_graph_fusion,
    "fusion_recurrent_gru": replay_recurrent_fusion,
    "gat": replay_graph_attention,
    "gatv2": replay_graph_attention,
    "gcn": replay_gcn,
    "recurrent": replay_recurrent,
    "vitdet_simple_feature_pyramid": replay_simple_pyramid,
}

"""Replays of the layer-fusion vectors: concat, sums, attention, FiLM and the attentive probe.

Shapes and options are read from the tensors and the sidecar. A module of another project is replayed by the fusion that
contains it, with the parts the fusion does not have (a norm in front of the query, say) taken out.
"""

from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from vitweave.modeling.layer_fusion.attentive_probe import AttentiveProbeFusion
from vitweave.modeling.layer_fusion.base import FusedTokens, LayerFusion, LayerTokens
from vitweave.modeling.layer_fusion.concat import ConcatFusion
from vitweave.modeling.layer_fusion.cross_layer_attention import CrossLayerAttentionFusion
from vitweave.modeling.layer_fusion.film import FilmFusion, modulated_sum
from vitweave.modeling.layer_fusion.gated_sum import GatedSumFusion
from vitweave.modeling.layer_fusion.layer_self_attention import EncoderBlock, LayerSelfAttentionFusion
from vitweave.modeling.layer_fusion.weighted_sum import WeightedSumFusion


def tokens_of(case) -> LayerTokens:
    """The inputs of a `fusion_*` case; the grid is only told apart by fusions that read it."""
    given = case.group("input")
    grid = tuple(case.config.get("grid", (1, given["patches"].shape[2])))
    return LayerTokens(
        cls=given["cls"].transpose(0, 1),
        patches=given["patches"].transpose(0, 1),
        grid=grid,
        base_cls=given["base_cls"],
        base_patches=given["base_patches"],
    )


def only_patches(patches: Tensor, base_cls: Tensor | None = None, base_patches: Tensor | None = None) -> LayerTokens:
    """Tokens (batch, layers, patches, hidden) with zeros for what is not given."""
    base_cls = torch.zeros_like(patches[:, 0, 0]) if base_cls is None else base_cls
    base_patches = torch.zeros_like(patches[:, 0]) if base_patches is None else base_patches
    return LayerTokens(patches.mean(dim=2), patches, (1, patches.shape[2]), base_cls, base_patches)


def load(fusion: nn.Module, state: dict[str, Tensor], case, unused: tuple[str, ...] = ()):
    """Load every weight of the module; what is left over must match one of the patterns `unused`."""
    wanted = fusion.state_dict().keys()
    left = [n for n in state if n not in wanted and not any(fnmatch(n, pattern) for pattern in unused)]
    assert not left, left
    fusion.to(case.dtype).load_state_dict({n: t for n, t in state.items() if n in wanted}, strict=True)
    return fusion.eval()


def both_forms(fusion_class: type[LayerFusion], case, state: dict, unused: tuple = (), **options):
    """The fused tokens of the residual and of the direct form."""
    tokens = tokens_of(case)
    sizes = tokens.cls.shape[1:]
    found = []
    for direct in (False, True):
        fusion = load(fusion_class(*sizes, direct=direct, **options), state, case, (*unused, "gamma_*"))
        found.append(fusion(tokens))
    return found


def input_of(fusion: LayerFusion, projection: str, tokens: LayerTokens) -> Tensor:
    """What `projection` of the fusion is given."""
    seen = []
    handle = getattr(fusion, projection).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    fusion(tokens)
    handle.remove()
    return seen[0]


# Concatenation -------------------------------------------------------------------------------------------------------


def replay_concat_dinov2(case):
    cls, patches = (case.tensors[f"input.{name}"].transpose(0, 1) for name in ("cls", "patches"))
    for name in case.group("output"):  # n<last blocks>_avg<0 or 1>
        number, average = name.removeprefix("n").split("_avg")
        layers = int(number)
        tokens = LayerTokens(cls[:, -layers:], patches[:, -layers:], (1, patches.shape[2]), cls[:, -1], patches[:, -1])
        fusion = ConcatFusion(layers, cls.shape[2], include_mean_patch=average == "1", norm="none").to(case.dtype)
        case.check(f"output.{name}", input_of(fusion, "proj", tokens))


def replay_dense_connector(case):
    states, base = case.tensors["input.hidden_states"], case.tensors["input.image_features"]
    states = states[:, :, states.shape[2] - base.shape[1] :].transpose(0, 1)  # without the class token
    shallow, all_but_last = states[:, [7, 15]], states[:, :-1]
    for name, chosen in (("sci", shallow), ("dci", all_but_last)):
        fusion = ConcatFusion(chosen.shape[1], base.shape[2], connector=name, dense=True, norm="none").to(case.dtype)
        case.check(f"output.{name}", input_of(fusion, "patch_proj", only_patches(chosen, base_patches=base)))
    fusion = ConcatFusion(2, base.shape[2], connector="sti", norm="none").to(case.dtype)
    case.check("output.sti", torch.cat([base, fusion(only_patches(shallow)).extra_tokens], dim=1))


def replay_fusion_concat(case):
    residual, direct = both_forms(ConcatFusion, case, case.group("state"), dense=True)
    case.check("output.global", residual.pooled)
    case.check("output.patches", residual.patches)
    case.check("output.direct_global", direct.pooled)
    case.check("output.direct_patches", direct.patches)


# Sums ----------------------------------------------------------------------------------------------------------------


def weighted(case, layers: Tensor, weights: Tensor, normalisation: str, scale: float = 1.0) -> FusedTokens:
    """The direct weighted sum of (batch, layers, patches, hidden)."""
    fusion = WeightedSumFusion(
        *layers.shape[1::2], normalisation=normalisation, dense=True, norm="none", direct=True
    ).to(case.dtype)
    fusion.load_state_dict({"layer_logits": weights, "scale": torch.tensor([scale])})
    return fusion(only_patches(layers))


def replay_bifpn(case):
    nodes, weights = case.tensors["input.nodes"], case.tensors["state.edge_weights"]
    layers = nodes.flatten(3).permute(1, 0, 3, 2)  # (batch, layers, patches, hidden)
    for name, normalisation in (("attn", "softmax"), ("fastattn", "fast")):
        found = weighted(case, layers, weights, normalisation).patches
        case.check(f"output.{name}", found.transpose(1, 2).unflatten(2, nodes.shape[-2:]))
    found = weighted(case, layers, torch.zeros_like(weights), "softmax", scale=len(weights)).patches
    case.check("output.sum", found.transpose(1, 2).unflatten(2, nodes.shape[-2:]))


def replay_weighted_layer_pooling(case):
    layers = case.tensors["input.all_layer_embeddings"][case.config["layer_start"] :].transpose(0, 1)
    found = weighted(case, layers, case.tensors["state.layer_weights"], "sum")
    case.check("output.token_embeddings", found.patches)


def replay_fusion_weighted_sum(case):
    for name, normalisation in (("softmax", "softmax"), ("fast", "fast")):
        options = {"normalisation": normalisation, "temperature": case.config["temperature"], "dense": True}
        residual, direct = both_forms(WeightedSumFusion, case, case.group("state"), **options)
        case.check(f"output.{name}_weights", residual.layer_weights)
        case.check(f"output.{name}_global", residual.pooled)
        case.check(f"output.{name}_patches", residual.patches)
        case.check(f"output.{name}_direct_global", direct.pooled)


def replay_fusion_gated_sum(case):
    state = case.group("state")
    options = {"gate_hidden_size": len(state["gate.fc1.bias"])}
    channel = {n.replace("gate_channel", "gate"): t for n, t in state.items() if not n.startswith("gate.fc2")}
    kinds = {
        "softmax": (state, {}),
        "sigmoid": (state, {"gate": "sigmoid"}),
        "channel": (channel, {"granularity": "channel"}),
    }
    for name, (weights, kind) in kinds.items():
        unused = ("gate_channel.*",)
        residual, direct = both_forms(GatedSumFusion, case, weights, unused, **options, **kind)
        fusion = load(GatedSumFusion(*tokens_of(case).cls.shape[1:], **options, **kind), weights, case, unused)
        gates = fusion.gates(fusion.normed_cls(tokens_of(case)))
        case.check(f"output.{name}_weights", gates if name == "channel" else gates.squeeze(2))
        case.check(f"output.{name}_global", residual.pooled)
        case.check(f"output.{name}_direct_global", direct.pooled)


# Attention to patches ------------------------------------------------------------------------------------------------


def pooler(case, state: dict, width: int, context_width: int, heads: int, **options) -> CrossLayerAttentionFusion:
    """The fusion as an attention pooler of one layer, whose patches may have another width."""
    options = {"mlp_ratio": 0, "norm": "none", "direct": True} | options
    fusion = CrossLayerAttentionFusion(1, width, num_heads=heads, **options)
    fusion.k_proj = nn.Linear(context_width, width, bias=False)
    fusion.v_proj = nn.Linear(context_width, width)
    fusion.layer_embed = nn.Parameter(torch.zeros(1, context_width))
    if "q_norm.weight" not in state:
        fusion.q_norm = nn.Identity()
    zeros = {"layer_embed": torch.zeros(1, context_width)}
    return load(fusion, zeros | state, case, ("k_proj.bias",))  # it cancels in the softmax


def crossvit_state(state: dict) -> dict:
    names = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "proj": "out_proj"}
    return {f"{names[n.split('.')[0]]}.{n.split('.')[1]}": t for n, t in state.items()}


def crossvit_block(case, tokens: Tensor, state: dict, heads: int) -> Tensor:
    """Token 0 plus its attention to all normalised tokens, (batch, 1, hidden)."""
    norm = {n.removeprefix("norm1."): t for n, t in state.items() if n.startswith("norm1.")}
    weights = crossvit_state({n.removeprefix("attn."): t for n, t in state.items() if n.startswith("attn.")})
    for name in ("weight", "bias"):
        weights |= {f"q_norm.{name}": norm[name], f"norm_patch.0.{name}": norm[name]}
    width = tokens.shape[2]
    weights["gamma_attn"] = torch.ones(width)
    fusion = pooler(case, weights, width, width, heads, norm="per_layer", direct=False)
    fusion.q_norm.eps = fusion.norm_patch[0].eps = 1e-5
    return fusion(only_patches(tokens[:, None], base_cls=tokens[:, 0])).pooled[:, None]


def replay_crossvit_attention(case):
    tokens, heads = case.tensors["input.x"], case.config["num_heads"]
    width = tokens.shape[2]
    fusion = pooler(case, crossvit_state(case.group("state")), width, width, heads)
    pooled = fusion(only_patches(tokens[:, None], base_cls=tokens[:, 0])).pooled
    case.check("output.cls", pooled[:, None])


def replay_crossvit_attention_block(case):
    tokens = case.tensors["input.x"]
    case.check("output.cls", crossvit_block(case, tokens, case.group("state"), case.config["num_heads"]))


def encoder_block(case, state: dict, heads: int, norm_first: bool = True) -> EncoderBlock:
    mlp_size, width = state["fc1.weight"].shape
    return load(EncoderBlock(width, heads, mlp_size, norm_first, eps=1e-5), state, case)


def replay_crossvit_multiscale(case):
    heads, branches = case.config["num_heads"], range(len(case.config["dim"]))

    def project(name: str, branch: int, states: Tensor) -> Tensor:
        state = case.group(f"state.{name}.{branch}")
        normed = nn.functional.layer_norm(states, states.shape[-1:], state["0.weight"], state["0.bias"], 1e-5)
        return nn.functional.linear(nn.functional.gelu(normed), state["2.weight"], state["2.bias"])

    states = []
    for branch in branches:
        tokens = case.tensors[f"input.x{branch}"]
        for depth in range(case.config["depth"][branch]):
            state = case.group(f"state.blocks.{branch}.{depth}")
            state = {
                n.replace("attn.proj", "out_proj").replace("attn.", "").replace("mlp.", ""): t for n, t in state.items()
            }
            tokens, _ = encoder_block(case, state, heads[branch])(tokens)
        states.append(tokens)
    for branch in branches:
        other = (branch + 1) % len(branches)
        tokens = torch.cat([project("projs", branch, states[branch][:, :1]), states[other][:, 1:]], dim=1)
        cls = crossvit_block(case, tokens, case.group(f"state.fusion.{branch}.0"), heads[other])
        found = torch.cat([project("revert_projs", branch, cls), states[branch][:, 1:]], dim=1)
        case.check(f"output.y{branch}", found)


def replay_openclip_pooler(case):
    state, facts = case.group("state"), case.config
    biases = dict(zip(("q_proj", "k_proj", "v_proj"), state["attn.in_proj_bias"].chunk(3), strict=True))
    weights = {f"{n}.weight": state[f"attn.{n}_weight"] for n in biases} | {f"{n}.bias": b for n, b in biases.items()}
    weights |= {f"out_proj.{n}": state[f"attn.out_proj.{n}"] for n in ("weight", "bias")} | {"query": state["query"]}
    weights |= {f"q_norm.{n}": state[f"ln_q.{n}"] for n in ("weight", "bias")}
    options = {"query": "learned", "num_queries": facts["n_queries"]}
    fusion = pooler(case, weights, facts["d_model"], facts["context_dim"], facts["n_head"], **options)
    fusion.q_norm.eps = 1e-5
    keys = case.tensors["input.x"]
    keys = nn.functional.layer_norm(keys, keys.shape[-1:], state["ln_k.weight"], state["ln_k.bias"], 1e-5)
    base_cls = keys.new_zeros(len(keys), facts["d_model"])
    fused = fusion(only_patches(keys[:, None], base_cls=base_cls))
    others = [] if fused.extra_tokens is None else [fused.extra_tokens]
    case.check("output.pooled", torch.cat([fused.pooled[:, None], *others], dim=1))


def replay_timm_attention_pool(case):
    state, facts = case.group("state"), case.config
    width = facts["in_features"]
    keys, values = ({n: state[f"kv.{n}"].chunk(2)[half] for n in ("weight", "bias")} for half in (0, 1))
    names = {"q": "q_proj", "proj": "out_proj", "norm": "ffn_norm", "mlp.fc1": "ffn.fc1", "mlp.fc2": "ffn.fc2"}
    weights = {f"{ours}.{n}": state[f"{theirs}.{n}"] for theirs, ours in names.items() for n in ("weight", "bias")}
    weights |= {f"k_proj.{n}": t for n, t in keys.items()} | {f"v_proj.{n}": t for n, t in values.items()}
    weights["query"] = state["latent"][0]
    options = {"query": "learned", "mlp_ratio": facts["mlp_ratio"]}
    fusion = pooler(case, weights, width, width, facts["num_heads"], **options)
    fusion.ffn_norm.eps = 1e-5
    case.check("output.pooled", fusion(only_patches(case.tensors["input.x"][:, None])).pooled)


def replay_fusion_cross_layer_attention(case):
    state, tokens = case.group("state"), tokens_of(case)
    ratio = len(state["ffn.fc1.bias"]) / tokens.cls.shape[2]
    mask = case.tensors["input.key_mask"].bool()
    without_ffn = state | {"gamma_ffn": torch.zeros_like(state["gamma_ffn"])}
    for folded in (True, False):
        options = {"num_heads": case.config["num_heads"], "mlp_ratio": ratio, "folded": folded}
        whole, half = (
            load(CrossLayerAttentionFusion(*tokens.cls.shape[1:], **options), weights, case, ("k_proj.bias",))
            for weights in (state, without_ffn)
        )
        for prefix, tokens.patch_mask in (("", None), ("masked_", mask)):
            fused = whole(tokens, output_attentions=True)
            case.check(f"output.{prefix}global", fused.pooled)
            case.check(f"output.{prefix}global", whole(tokens).pooled)
            case.check(f"output.{prefix}attention", fused.attentions)
            case.check(f"output.{prefix}after_attention", half(tokens).pooled)
            if not prefix:
                case.check("output.layer_mass", fused.layer_weights)


# Attention to layers -------------------------------------------------------------------------------------------------


def replay_encoder_layer(case):
    names = {"self_attn.in_proj_": "qkv.", "self_attn.": "", "linear1": "fc1", "linear2": "fc2"}
    state = case.group("state")
    for theirs, ours in names.items():
        state = {n.replace(theirs, ours): t for n, t in state.items()}
    block = encoder_block(case, state, case.config["nhead"], case.config["norm_first"])
    for output_attentions in (False, True):
        case.check("output.y", block(case.tensors["input.x"], output_attentions)[0])


def replay_fusion_layer_self_attention(case):
    options = {name: case.config[name] for name in ("depth", "num_heads", "mlp_ratio")}
    for readout in ("fuse", "last", "mean"):
        unused = () if readout == "fuse" else ("fuse_token",)
        residual, direct = both_forms(
            LayerSelfAttentionFusion, case, case.group("state"), unused, readout=readout, **options
        )
        case.check(f"output.{readout}_global", residual.pooled)
        case.check(f"output.{readout}_readout", direct.pooled)


def replay_alf_attentive_block(case):
    tokens, facts = case.tensors["input.tokens"], case.config
    state = {n.replace("cross_attn.", "").replace("proj.", "out_proj."): t for n, t in case.group("state").items()}
    state = {(f"{n[0]}_proj.weight" if n in ("q.weight", "k.weight", "v.weight") else n): t for n, t in state.items()}
    state["query"] = state.pop("query_token").flatten()
    fusion = AttentiveProbeFusion(tokens.shape[1] // 2, facts["dim"], num_heads=facts["num_heads"], direct=True)
    cls, means = tokens[:, ::2], tokens[:, 1::2]
    fused = load(fusion, state, case)(LayerTokens(cls, None, (1, 1), cls[:, 0], None, patch_means=means))
    case.check("output.pooled", fused.pooled)


def replay_fusion_attentive_probe(case):
    state, heads = case.group("state"), case.config["num_heads"]
    residual, direct = both_forms(AttentiveProbeFusion, case, state, num_heads=heads)
    case.check("output.global", residual.pooled)
    case.check("output.direct_global", direct.pooled)
    fusion = load(AttentiveProbeFusion(*tokens_of(case).cls.shape[1:], num_heads=heads), state, case)
    fused = fusion(tokens_of(case), output_attentions=True)
    case.check("output.attention", fused.attentions)
    case.check("output.global", fused.pooled)


# Modulation ----------------------------------------------------------------------------------------------------------


def replay_film_official(case):
    given = case.group("input")
    layers = given["x"].flatten(2).transpose(1, 2)[:, None]  # one layer: (batch, 1, patches, hidden)
    weights = torch.ones(1, dtype=case.dtype)
    found = modulated_sum(layers, given["gammas"][:, None] - 1, given["betas"][:, None], weights)
    case.check("output.y", found.transpose(1, 2).unflatten(2, given["x"].shape[-2:]))


def replay_fusion_film(case):
    state, tokens = case.group("state"), tokens_of(case)
    size = len(state["film.fc1.bias"])
    fusion = load(FilmFusion(*tokens.cls.shape[1:], film_hidden_size=size), state, case)
    delta, beta = fusion.modulation(tokens.base_cls)
    case.check("output.delta_gamma", delta)
    case.check("output.beta", beta)
    patches, one = fusion.normed_patches(tokens), torch.ones(1, dtype=case.dtype)
    by_layer = [slice(layer, layer + 1) for layer in range(fusion.num_layers)]
    modulated = [modulated_sum(patches[:, at], delta[:, at], beta[:, at], one) for at in by_layer]
    case.check("output.modulated", torch.stack(modulated))
    fused = fusion(tokens)
    case.check("output.global", fused.pooled)
    case.check("output.patches", fused.patches)


KINDS = {
    "alf_attentive_block": replay_alf_attentive_block,
    "bifpn_fpn_combine": replay_bifpn,
    "concat_dinov2_linear_input": replay_concat_dinov2,
    "crossvit_cross_attention": replay_crossvit_attention,
    "crossvit_cross_attention_block": replay_crossvit_attention_block,
    "crossvit_multiscale_block": replay_crossvit_multiscale,
    "dense_connector": replay_dense_connector,
    "encoder_layer": replay_encoder_layer,
    "film_official": replay_film_official,
    "fusion_attentive_layer_probe": replay_fusion_attentive_probe,
    "fusion_concat": replay_fusion_concat,
    "fusion_cross_layer_attention": replay_fusion_cross_layer_attention,
    "fusion_film_fusion": replay_fusion_film,
    "fusion_gated_sum": replay_fusion_gated_sum,
    "fusion_layer_self_attention": replay_fusion_layer_self_attention,
    "fusion_weighted_sum": replay_fusion_weighted_sum,
    "openclip_attentional_pooler": replay_openclip_pooler,
    "timm_attention_pool_latent": replay_timm_attention_pool,
    "weighted_layer_pooling_st": replay_weighted_layer_pooling,
}

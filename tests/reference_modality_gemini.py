"""Replays of the vectors of GeminiFusion's module, cross-attention, and the fusion of points and images."""

import torch

from vitweave.modeling.conversion.gemini_units import from_official_units
from vitweave.modeling.modality_fusion.base import BlockInputs
from vitweave.modeling.modality_fusion.gemini import GeminiFusion

EQ6_NAMES = {  # the formula's names -> ours; matrices multiply from the right there
    "w_q": "to_query.weight",
    "w_k": "to_key.weight",
    "w_v": "to_value.weight",
    "noise_k": "key_noise",
    "noise_v": "value_noise",
    "phi.fc1.bias": "relation.own_proj.bias",
    "phi.fc2.weight": "relation.gate_proj.weight",
    "phi.fc2.bias": "relation.gate_proj.bias",
}


def allow_float32(case):
    """Official outputs in float32 differ from their own in float64 by this much."""
    noise = case.sidecar.get("float32_vs_float64_max_abs")
    if noise is not None:
        case.tolerance = max(1e-5, 5 * noise)


def inputs_of(streams: torch.Tensor) -> BlockInputs:
    return BlockInputs(residual=streams, grid=(1, streams.shape[2]))


def pair(case, group: str, name: str) -> torch.Tensor:
    """(modalities, ...) of `<group>.<name>_0` and `_1`."""
    return torch.stack([case.tensors[f"{group}.{name}_{index}"] for index in range(2)])


def check_pair(case, name: str, actual: torch.Tensor):
    for index in range(2):
        case.check(f"{name}_{index}", actual[index])


def check_gradients(case, module: torch.nn.Module):
    """Of every tensor of the state; that of the keys' bias is zero."""
    wanted = from_official_units(case.group("grad.state"))
    own = dict(module.named_parameters())
    assert wanted.keys() == module.state_dict().keys()
    for name, gradient in wanted.items():
        case.tensors["wanted"] = gradient
        case.check("wanted", own[name].grad if name in own else torch.zeros_like(gradient))


def replay_core(case):
    allow_float32(case)
    fusion = GeminiFusion(2, case.config["dim"], num_heads=case.config["n_heads"]).to(case.dtype)
    fusion.load_state_dict(from_official_units(case.group("state")))
    streams = pair(case, "input", "x").requires_grad_()
    relation = fusion.relation(streams)
    check_pair(case, "inter.relation", relation[:, 0])
    share = fusion.other_shares(streams, relation, None)[:, 0].mean(dim=-1)
    check_pair(case, "inter.attn_head_mean", torch.stack([1 - share, share], dim=-1))
    fused, penalty = fusion(streams, inputs_of(streams))
    assert penalty is None
    check_pair(case, "output.y", fused)
    fused.backward(pair(case, "cotangent", "y"))
    check_pair(case, "grad.input.x", streams.grad)
    check_gradients(case, fusion)


def replay_eq6(case):
    config = case.config
    fusion = GeminiFusion(2, config["C"], num_heads=config["heads"], form="paper").to(case.dtype)
    state = case.group("state")
    first = state.pop("phi.fc1.weight").chunk(2, dim=1)
    state = {EQ6_NAMES[name]: tensor for name, tensor in state.items()}
    for name in ("to_query.weight", "to_key.weight", "to_value.weight"):
        state[name] = state[name].T[None]
    for name in ("key_noise", "value_noise"):
        state[name] = state[name][None]
    state |= {"relation.own_proj.weight": first[0], "relation.other_proj.weight": first[1]}
    fusion.load_state_dict(state)
    streams = pair(case, "input", "x")
    check_pair(case, "inter.relation", fusion.relation(streams)[:, 0])
    check_pair(case, "output.y", fusion(streams, inputs_of(streams))[0])


KINDS = {"gemini_fusion_core": replay_core, "gemini_eq6_literal": replay_eq6}

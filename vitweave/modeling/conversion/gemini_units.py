"""Tensors of a GeminiFusion as the official checkpoints hold them (JiaDingCN/GeminiFusion), and ours.

Official: a `torch.nn.MultiheadAttention` per direction, `cross_attn_0_to_1` for the one that updates modality 0, with
query, key and value packed; the relation's first layer reads [own, other]. Ours: a projection of all modalities is one
tensor, query, key and value are apart, and so are the halves of that layer. Both functions take a state dict of any
model, find every fusion in it, at any prefix, and leave all other tensors as they are.
"""

import re

import torch
from torch import Tensor

UNITS = ("cross_attn_0_to_1", "cross_attn_1_to_0")  # by the modality they update
PACKED = ("to_query", "to_key", "to_value")
SAME = {
    "relation_judger.0.fc2.weight": "relation.gate_proj.weight",
    "relation_judger.0.fc2.bias": "relation.gate_proj.bias",
    "relation_judger.0.fc1.bias": "relation.own_proj.bias",
    "k_noise.weight": "key_noise",
    "v_noise.weight": "value_noise",
}
FIRST_LAYER = "relation_judger.0.fc1.weight"
HALVES = ("relation.own_proj.weight", "relation.other_proj.weight")


def from_official_units(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors to ours."""
    state = dict(state)
    for prefix in prefixes(state, f"{UNITS[0]}.in_proj_weight"):
        weights, biases = ([state.pop(f"{prefix}{u}.in_proj_{kind}") for u in UNITS] for kind in ("weight", "bias"))
        for name, weight, bias in zip(
            PACKED, torch.stack(weights).chunk(3, dim=1), torch.stack(biases).chunk(3, dim=1), strict=True
        ):
            state[f"{prefix}{name}.weight"] = weight.contiguous()
            state[prefix + ("key_bias" if name == "to_key" else f"{name}.bias")] = bias.contiguous()
        for kind in ("weight", "bias"):
            state[f"{prefix}to_output.{kind}"] = torch.stack([state.pop(f"{prefix}{u}.out_proj.{kind}") for u in UNITS])
        if prefix + FIRST_LAYER in state:  # not in plain cross-attention
            for name, half in zip(HALVES, state.pop(prefix + FIRST_LAYER).chunk(2, dim=1), strict=True):
                state[prefix + name] = half.contiguous()
            for official, ours in SAME.items():
                state[prefix + ours] = state.pop(prefix + official)
    return state


def to_official_units(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors of two modalities to the official ones."""
    state = dict(state)
    for prefix in prefixes(state, "to_query.weight"):
        if state[f"{prefix}to_query.weight"].shape[0] != len(UNITS):
            count = state[f"{prefix}to_query.weight"].shape[0]
            raise ValueError(f"expected a fusion of two modalities, the official form; {prefix!r} has {count}")
        weights = torch.cat([state.pop(f"{prefix}{name}.weight") for name in PACKED], dim=1)
        names = [prefix + ("key_bias" if name == "to_key" else f"{name}.bias") for name in PACKED]
        packed = {"in_proj_weight": weights, "in_proj_bias": torch.cat([state.pop(name) for name in names], dim=1)}
        packed |= {f"out_proj.{kind}": state.pop(f"{prefix}to_output.{kind}") for kind in ("weight", "bias")}
        for name, tensor in packed.items():
            for unit, part in zip(UNITS, tensor.unbind(), strict=True):
                state[f"{prefix}{unit}.{name}"] = part.contiguous()
        if prefix + HALVES[0] in state:
            state[prefix + FIRST_LAYER] = torch.cat([state.pop(prefix + name) for name in HALVES], dim=1)
            for official, ours in SAME.items():
                state[prefix + official] = state.pop(prefix + ours)
    return state


def prefixes(state: dict[str, Tensor], ending: str) -> list[str]:
    """What stands in front of `ending` in the names of a state dict."""
    found = (re.fullmatch(rf"(|.*\.){re.escape(ending)}", name) for name in state)
    return [match[1] for match in found if match]

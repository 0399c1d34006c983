"""Tensors of a GeminiFusion as the official checkpoints hold them (JiaDingCN/GeminiFusion), and ours.

Official: a `torch.nn.MultiheadAttention` per direction, `cross_attn_0_to_1` for the one that updates modality 0, with
query, key and value packed; the relation's first layer reads [own, other]. Ours: a projection of all modalities is one
tensor, query, key and value are apart, and so are the halves of that layer.
"""

from torch import Tensor

from vitweave.modeling.conversion.name_table import NameEntry, NameTable, leaves


def unit_entries(official: str, ours: str) -> list[NameEntry]:
    """The entries of a fusion whose names have these prefixes; plain cross-attention has the first ones only."""

    def projections(leaf: str) -> tuple[str, ...]:
        key = "key_bias" if leaf == "bias" else "to_key.weight"
        return (f"{ours}to_query.{leaf}", ours + key, f"{ours}to_value.{leaf}")

    unit, judger = official + "cross_attn_{unit}.", official + "relation_judger.0."
    return [
        NameEntry(unit + "in_proj_weight", projections("weight")),
        NameEntry(unit + "in_proj_bias", projections("bias")),
        leaves(unit + "out_proj", ours + "to_output"),
        NameEntry(
            judger + "fc1.weight", (ours + "relation.own_proj.weight", ours + "relation.other_proj.weight"), axis=1
        ),
        NameEntry(judger + "fc1.bias", (ours + "relation.own_proj.bias",)),
        leaves(judger + "fc2", ours + "relation.gate_proj"),
        NameEntry(official + "k_noise.weight", (ours + "key_noise",)),
        NameEntry(official + "v_noise.weight", (ours + "value_noise",)),
    ]


ANYWHERE = NameTable(unit_entries("{anywhere}", "{anywhere}"), "a GeminiFusion")


def from_official_units(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors to ours, of every fusion in a state dict of any model; all others stay as they are."""
    units = {name: tensor for name, tensor in state.items() if ANYWHERE.read(name) is not None}
    return {name: tensor for name, tensor in state.items() if name not in units} | ANYWHERE.to_ours(units)


def to_official_units(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors of two modalities to the official ones, of every fusion; all others stay as they are."""
    units = {name: tensor for name, tensor in state.items() if ANYWHERE.read_ours(name) is not None}
    return {name: tensor for name, tensor in state.items() if name not in units} | ANYWHERE.to_official(units)

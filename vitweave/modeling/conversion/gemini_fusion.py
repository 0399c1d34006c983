"""Tensors of the official two-stream MiT segmenters, and ours.

The code behind GeminiFusion (MiT), its DeLiVER branch and TokenFusion (JiaDingCN/GeminiFusion, yikaiw/TokenFusion)
shares one layout: weights of all modalities under `.module`, norms as `ln_0`, `ln_1`, keys and values packed. Ours hold
a norm's modalities as rows, and keys and values apart.
"""

import re
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from vitweave.modeling.conversion.gemini_units import from_official_units

STREAMS = "modality_fusion.streams.stages"
BLOCK = r"(?:encoder|backbone)\.block(?P<stage>\d)\.(?P<block>\d+)"
STAGE = r"(?:encoder|backbone)"
HEAD = r"(?:decoder|decode_head)"
ROW = r"ln_(?P<row>\d)"
LEAF = r"(?P<leaf>weight|bias)"
# official place in a score net of TokenFusion -> our layer
SCORE_LAYERS = {"0": "norm", "1": "fc1", "3": "fc2", "5": "fc3", "7": "fc4"}
# official name, in which the fusions' own tensors are ours already -> our name. {stage} counts from 0; a tensor with a
# `row` is one row of ours, one with a `group` a group of its channels, `kv` is keys and values.
NAMES = {
    rf"{STAGE}\.patch_embed(?P<stage>\d)\.proj\.module\.{LEAF}": "{stage}.patch_embeddings.proj.{leaf}",
    rf"{STAGE}\.patch_embed(?P<stage>\d)\.norm\.{ROW}\.{LEAF}": "{stage}.patch_embeddings.layer_norm.{leaf}",
    rf"{BLOCK}\.norm1\.{ROW}\.{LEAF}": "{stage}.blocks.{block}.layernorm_before.{leaf}",
    rf"{BLOCK}\.norm2\.{ROW}\.{LEAF}": "{stage}.blocks.{block}.layernorm_after.{leaf}",
    rf"{BLOCK}\.attn\.q\.module\.{LEAF}": "{stage}.blocks.{block}.attention.q_proj.{leaf}",
    rf"{BLOCK}\.attn\.(?P<kv>kv)\.module\.{LEAF}": "{stage}.blocks.{block}.attention.{kv}_proj.{leaf}",
    rf"{BLOCK}\.attn\.proj\.module\.{LEAF}": "{stage}.blocks.{block}.attention.o_proj.{leaf}",
    rf"{BLOCK}\.attn\.sr\.module\.{LEAF}": (
        "{stage}.blocks.{block}.attention.sequence_reduction.sequence_reduction.{leaf}"
    ),
    rf"{BLOCK}\.attn\.norm\.{ROW}\.{LEAF}": "{stage}.blocks.{block}.attention.sequence_reduction.layer_norm.{leaf}",
    rf"{BLOCK}\.attn\.(?P<own>(?:to_|key_|value_|relation\.).+)": "{stage}.blocks.{block}.fusion.{own}",
    rf"{BLOCK}\.mlp\.(?P<layer>fc1|fc2)\.module\.{LEAF}": "{stage}.blocks.{block}.mlp.{layer}.{leaf}",
    rf"{BLOCK}\.mlp\.dwconv\.dwconv\.{LEAF}": "{stage}.blocks.{block}.mlp.dwconv.dwconv.{leaf}",
    rf"{STAGE}\.norm(?P<stage>\d)\.{ROW}\.{LEAF}": "{stage}.layer_norm.{leaf}",
    rf"{STAGE}\.score_predictor\.(?P<index>\d)\.score_nets\.(?P<row>\d)\.(?P<place>[01357])\.{LEAF}": (
        "{index}.fusion.score_net.{place}.{leaf}"
    ),
    rf"{STAGE}\.extra_score_predictor\.(?P<index>\d)\.score_nets\.(?P<group>\d)\.0\.{LEAF}": (
        "{index}.auxiliary.local.{leaf}"
    ),
    rf"{STAGE}\.extra_score_predictor\.(?P<index>\d)\.score_nets\.(?P<group>\d)\.1\.{LEAF}": (
        "{index}.auxiliary.score.{leaf}"
    ),
}
HEAD_NAMES = {
    rf"{HEAD}\.linear_c(?P<stage>\d)\.proj\.{LEAF}": "decoder.projections.{stage}.{leaf}",
    rf"{HEAD}\.linear_fuse\.conv\.(?P<leaf>weight)": "decoder.fuse.{leaf}",
    rf"{HEAD}\.linear_fuse\.bn\.(?P<leaf>\w+)": "decoder.norm.{leaf}",
    rf"{HEAD}\.linear_pred\.{LEAF}": "decoder.classifier.{leaf}",
    r"alpha": "ensemble.alpha",
}
UNUSED = r"(?:encoder|backbone)\.extra_score_predictor\.\d\.score_nets\.(\d)\..+"


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors of a `WeTr` / `GeminiFusion` segmenter to those of `ModalityFusionForSemanticSegmentation`.

    The last score net of every stage of a model of three or more modalities is dropped: nothing reads it.
    """
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    joins: dict[str, Callable] = {}
    unused, unknown = unused_names(state), []
    for official, tensor in from_official_units(state).items():
        if official in unused:
            continue
        found = our_name(official)
        if found is None:
            unknown.append(official)
            continue
        name, facts = found
        if "kv" in facts:
            for letter, half in zip("kv", tensor.chunk(2), strict=True):
                parts[name.replace("kv_proj", f"{letter}_proj")][0] = half.contiguous()
            continue
        parts[name][int(facts.get("row", facts.get("group", 0)))] = tensor
        if "row" in facts or "group" in facts:
            joins[name] = torch.stack if "row" in facts else torch.cat
    if unknown:
        raise ValueError(f"{len(unknown)} names are none of the official two-stream MiT segmenters, e.g. {unknown[:5]}")
    return {
        name: joins[name]([found[index] for index in sorted(found)]) if name in joins else found[0]
        for name, found in parts.items()
    }


def our_name(official: str) -> tuple[str, dict[str, str]] | None:
    """Our name and what the official one says, or None for an unknown name."""
    for names, prefix in ((NAMES, f"{STREAMS}."), (HEAD_NAMES, "")):
        for pattern, ours in names.items():
            match = re.fullmatch(pattern, official)
            if match:
                facts = match.groupdict()
                if "stage" in facts:
                    facts["stage"] = str(int(facts["stage"]) - 1)
                if "place" in facts:
                    facts["place"] = SCORE_LAYERS[facts["place"]]
                return prefix + ours.format(**facts), facts
    return None


def unused_names(state: dict[str, Tensor]) -> set[str]:
    """The score nets with the highest index, of which there is one more than modalities to score."""
    nets = {name: int(match[1]) for name in state if (match := re.fullmatch(UNUSED, name))}
    return {name for name, index in nets.items() if index == max(nets.values())}

"""Tensors of the official two-stream Swin segmenters (JiaDingCN/GeminiFusion), and ours, both ways.

Official: weights of all modalities under `.module`, the norms that each modality has of its own as `ln_0`, `ln_1`;
query, key and value packed; the places in a window stored beside their table. Ours hold a norm's modalities as rows,
query, key and value apart, and compute the places.
"""

import re
from collections import defaultdict

import torch
from torch import Tensor

from vitweave.modeling.conversion.gemini_units import from_official_units, to_official_units
from vitweave.modeling.modality_streams.windows import relative_places

BODY, BLOCK = "encoder.body.", "encoder.body.layers.{stage}.blocks.{block}."
STREAMS = "modality_fusion.streams."
OURS = STREAMS + "stages.{stage}.blocks.{block}."
# official name, in which the fusions' own tensors are ours already -> our name. Of a `row` ours holds all, one behind
# the other; the packed tensor is one after the other in each `part`; a `number` counts stages from 1.
NAMES = {
    BODY + "patch_embed.proj.module.{leaf}": STREAMS + "embeddings.projection.{leaf}",
    BODY + "patch_embed.norm.ln_{row}.{leaf}": STREAMS + "embeddings.norm.{leaf}",
    BLOCK + "norm1.module.{leaf}": OURS + "layernorm_before.{leaf}",
    BLOCK + "norm2.module.{leaf}": OURS + "layernorm_after.{leaf}",
    BLOCK + "attn.module.{table}": OURS + "attention.relative_position_bias.{table}",
    BLOCK + "attn.module.qkv.{leaf}": OURS + "attention.{part}_proj.{leaf}",
    BLOCK + "attn.module.proj.{leaf}": OURS + "attention.o_proj.{leaf}",
    BLOCK + "mlp.{layer}.module.{leaf}": OURS + "mlp.{layer}.{leaf}",
    BLOCK + "{own}": OURS + "fusion.{own}",
    BODY + "layers.{stage}.downsample.module.{merge}": STREAMS + "stages.{stage}.downsample.{merge}",
    BODY + "norm{stage}.ln_{row}.{leaf}": STREAMS + "stages.{stage}.layer_norm.{leaf}",
    "decoder.linear_c{number}.proj.{leaf}": "decoder.projections.{stage}.{leaf}",
    "decoder.linear_fuse.conv.weight": "decoder.fuse.weight",
    "decoder.linear_fuse.bn.{statistic}": "decoder.norm.{statistic}",
    "decoder.linear_pred.{leaf}": "decoder.classifier.{leaf}",
    "alpha": "ensemble.alpha",
}
FIELDS = {
    "stage": r"\d",
    "number": r"\d",
    "block": r"\d+",
    "row": r"\d",
    "part": "[qkv]",
    "leaf": "weight|bias",
    "layer": "fc[12]",
    "table": "relative_position_bias_table",
    "own": r"(?:to_\w+|relation)\..+|key_bias|key_noise|value_noise",
    "merge": r"norm\.(?:weight|bias)|reduction\.weight",
    "statistic": "weight|bias|running_mean|running_var|num_batches_tracked",
}
PLACES = ".attn.module.relative_position_index"


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors to those of `ModalityFusionForSemanticSegmentation`."""
    rows, found = defaultdict(dict), {}
    for name, tensor in from_official_units(state).items():
        if name.endswith(PLACES):
            continue
        ours, facts = translate(name, NAMES)
        if "{part}" in ours:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                found[ours.format(part=part, **facts)] = third.contiguous()
        elif "row" in facts:
            rows[ours.format(**facts)][int(facts["row"])] = tensor
        else:
            found[ours.format(**facts)] = tensor
    return found | {name: torch.stack([parts[row] for row in sorted(parts)]) for name, parts in rows.items()}


def to_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors of two modalities to the official ones."""
    packed, found = defaultdict(dict), {}
    names = {ours: official for official, ours in NAMES.items()}
    for name, tensor in state.items():
        official, facts = translate(name, names)
        if "part" in facts:
            packed[official.format(**facts)][facts["part"]] = tensor
        elif "{row}" in official:
            for row, part in enumerate(tensor.unbind()):
                found[official.format(row=row, **facts)] = part.contiguous()
        else:
            found[official.format(**facts)] = tensor
        if "table" in facts:
            window = (round(tensor.shape[0] ** 0.5) + 1) // 2
            block = BLOCK.removesuffix(".").format(**facts)
            found[block + PLACES] = relative_places(window, tensor.device)
    found |= {name: torch.cat([parts[part] for part in "qkv"]) for name, parts in packed.items()}
    return to_official_units(found)


def translate(name: str, names: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The other side's template for a name, and what fills it."""
    for template, other in names.items():
        match = re.fullmatch(pattern_of(template), name)
        if match:
            facts = match.groupdict()
            if "number" in facts:
                facts["stage"] = str(int(facts["number"]) - 1)
            elif "{number}" in other:
                facts["number"] = str(int(facts["stage"]) + 1)
            return other, facts
    raise ValueError(f"{name!r} is no tensor of the two-stream Swin segmenters, as GeminiFusion or we name them")


def pattern_of(template: str) -> str:
    """The regular expression of a template."""
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    return re.sub(r"\{(\w+)\}", lambda field: f"(?P<{field[1]}>{FIELDS[field[1]]})", pattern)

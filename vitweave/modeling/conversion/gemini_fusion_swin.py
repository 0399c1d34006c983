"""Tensors of the official two-stream Swin segmenters (JiaDingCN/GeminiFusion), and ours, both ways.

Official: weights of all modalities under `.module`, the norms that each modality has of its own as `ln_0`, `ln_1`;
query, key and value packed; the places in a window stored beside their table. Ours hold a norm's modalities as rows,
query, key and value apart, and compute the places.
"""

import re
from collections.abc import Iterable

from torch import Tensor
from transformers import SwinConfig

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.conversion.gemini_units import unit_entries
from vitweave.modeling.conversion.mit_names import STREAMS, decoder_entries
from vitweave.modeling.conversion.modality_release import ModalityRelease, OfficialState
from vitweave.modeling.conversion.modality_sizes import decoder_fields, numbers_in, recipe_fields
from vitweave.modeling.conversion.name_table import NameEntry, NameTable, leaves
from vitweave.modeling.modality_streams.windows import relative_places

BODY = "encoder.body."
BLOCK = BODY + "layers.{stage}.blocks.{block}."
OURS = STREAMS + ".{stage}.blocks.{block}."
EMBEDDINGS = STREAMS.removesuffix("stages") + "embeddings."
QUERY_KEY_VALUE = tuple(f"{OURS}attention.{letter}_proj.{{leaf}}" for letter in "qkv")
TABLE = NameTable(
    [
        leaves(BODY + "patch_embed.proj.module", EMBEDDINGS + "projection"),
        leaves(BODY + "patch_embed.norm.ln_{row}", EMBEDDINGS + "norm"),
        leaves(BLOCK + "norm1.module", OURS + "layernorm_before"),
        leaves(BLOCK + "norm2.module", OURS + "layernorm_after"),
        NameEntry(BLOCK + "attn.module.{table}", (OURS + "attention.relative_position_bias.{table}",)),
        NameEntry(BLOCK + "attn.module.qkv.{leaf}", QUERY_KEY_VALUE),
        leaves(BLOCK + "attn.module.proj", OURS + "attention.o_proj"),
        leaves(BLOCK + "mlp.{layer}.module", OURS + "mlp.{layer}"),
        *unit_entries(BLOCK, OURS + "fusion."),
        NameEntry(BODY + "layers.{stage}.downsample.module.{merge}", (STREAMS + ".{stage}.downsample.{merge}",)),
        leaves(BODY + "norm{stage}.ln_{row}", STREAMS + ".{stage}.layer_norm"),
        *decoder_entries("decoder."),
        NameEntry("alpha", ("ensemble.alpha",)),
    ],
    "the two-stream Swin segmenters",
)
PLACES, BIASES = ".relative_position_index", ".relative_position_bias_table"
COMPUTED = "places in a window, computed from its size"


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors to those of `ModalityFusionForSemanticSegmentation`."""
    return TABLE.to_ours({name: tensor for name, tensor in state.items() if not name.endswith(PLACES)})


def to_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors of two modalities to the official ones."""
    official = TABLE.to_official(state)
    return official | places_in_windows(official)


def places_in_windows(official: dict[str, Tensor], config: ModalityFusionConfig | None = None) -> dict[str, Tensor]:
    """What the official code stores beside every table of biases."""
    found = {}
    for name, tensor in official.items():
        if name.endswith(BIASES):
            window = window_of(tensor.shape[0])
            found[name.removesuffix(BIASES) + PLACES] = relative_places(window, tensor.device)
    return found


def window_of(rows: int) -> int:
    """Side of the window whose table of biases has so many rows."""
    return (round(rows**0.5) + 1) // 2


def computed_places(names: Iterable[str]) -> dict[str, str]:
    """They are left out."""
    return {name: COMPUTED for name in names if name.endswith(PLACES)}


def swin_fields(state: OfficialState) -> dict:
    """GeminiFusion with Swin on NYUDv2 and SUN RGB-D; everything follows from the tensors."""
    width, channels, patch, _ = state.size(BODY + "patch_embed.proj.module.weight")
    stages = sorted(numbers_in(state, rf"{re.escape(BODY)}layers\.(\d)\..+"))
    depths = [len(numbers_in(state, rf"{re.escape(BODY)}layers\.{stage}\.blocks\.(\d+)\..+")) for stage in stages]
    first = [f"{BODY}layers.{stage}.blocks.0." for stage in stages]
    tables = [state.size(f"{block}attn.module{BIASES}") for block in first]
    stream = SwinConfig(
        embed_dim=width,
        num_channels=channels,
        patch_size=patch,
        depths=depths,
        num_heads=[heads for _, heads in tables],
        window_size=window_of(tables[0][0]),
        mlp_ratio=state.size(first[0] + "mlp.fc1.module.weight")[0] / width,
        drop_path_rate=0.0,
    )
    return {
        "stream_config": stream,
        "fusion_type": "gemini",
        "fusion_options": {"num_heads": 8},
        **decoder_fields(state, "decoder."),
        **recipe_fields(state, "decoder."),
    }


def modality_count(state: OfficialState) -> int:
    """Norms behind the patch embedding."""
    return len(numbers_in(state, rf"{re.escape(BODY)}patch_embed\.norm\.ln_(\d)\.weight"))


GEMINI_FUSION_SWIN = ModalityRelease(
    TABLE, swin_fields, modality_count, dropped=computed_places, restored=places_in_windows
)

"""Tensors of CMX (arXiv:2203.04838) with MiT and MLP decoder as huaaaliu/RGBX_Semantic_Segmentation stores them, and
ours.

Official: two encoders, the second one's names with `extra_`; per stage a module that rectifies and one that fuses to
the map that is decoded. The decoder has a bias in front of its norm, whose epsilon is 1e-3. Ours number the encoders'
layers and hold their norms as rows.
"""

from vitweave.modeling.conversion.mit_names import STREAMS, decoder_entries, mit_entries
from vitweave.modeling.conversion.modality_release import ModalityRelease, OfficialState
from vitweave.modeling.conversion.modality_sizes import decoder_fields, mit_stream
from vitweave.modeling.conversion.name_table import NameEntry, NameTable, leaves

FUSION = STREAMS + ".{stage}.fusion."
RECTIFY, FUSE = "backbone.FRMs.{stage}.", "backbone.FFMs.{stage}."
# official place in a rectify module -> ours; those of `spatial_weights` are 1x1 convolutions
GATES = {
    "channel_weights.mlp.0": "channel_fc1",
    "channel_weights.mlp.2": "channel_fc2",
    "spatial_weights.mlp.0": "spatial_fc1",
    "spatial_weights.mlp.2": "spatial_fc2",
}
PATH = {"channel_proj": "in_proj", "cross_attn.kv": "kv_proj", "end_proj": "out_proj", "norm": "norm"}
CONVOLUTIONS = {
    "residual": "residual",
    "channel_embed.0": "reduce",
    "channel_embed.1": "dwconv",
    "channel_embed.3": "expand",
}
BATCH_NORMS = {"channel_embed.4": "expand_norm", "norm": "norm"}


def gate_entries(official: str, ours: str) -> list[NameEntry]:
    """The entries of a module that rectifies."""
    return [leaves(official + place, f"{ours}gates.{gate}", pixel="spatial" in place) for place, gate in GATES.items()]


def fuse_entries(official: str, ours: str) -> list[NameEntry]:
    """The entries of a module that fuses."""
    embed, our_embed = official + "channel_emb.", ours + "channel_embed."
    return [
        *(leaves(f"{official}cross.{place}{{side}}", f"{ours}cross_path.{path}") for place, path in PATH.items()),
        *(leaves(embed + place, our_embed + conv) for place, conv in CONVOLUTIONS.items()),
        *(
            NameEntry(f"{embed}{place}.{{statistic}}", (f"{our_embed}{norm}.{{statistic}}",))
            for place, norm in BATCH_NORMS.items()
        ),
    ]


TABLE = NameTable(
    [
        *mit_entries("backbone.{extra}", index=".{index}"),
        *gate_entries(RECTIFY, FUSION),
        *fuse_entries(FUSE, FUSION),
        *decoder_entries("decode_head.", conv="0", norm="1"),
    ],
    "CMX",
)


def cmx_fields(state: OfficialState) -> dict:
    """Attention heads of the fusion are as wide as those of the first stage, as in B0 to B5."""
    stream = mit_stream(state, "backbone.")
    narrow, wide = state.size("backbone.FRMs.0.channel_weights.mlp.0.weight")
    options = {"fuse": "map", "head_width": stream.hidden_sizes[0], "reduction": wide // narrow}
    return {
        "stream_config": stream,
        "shared_weights": False,
        "conv_norm_eps": 1e-5,
        "fusion_type": "rectify_fuse",
        "fusion_options": options,
        "decoder_options": {"fuse_bias": True, "norm_eps": 1e-3},
        **decoder_fields(state, "decode_head."),
    }


CMX = ModalityRelease(TABLE, cmx_fields, lambda state: 2)

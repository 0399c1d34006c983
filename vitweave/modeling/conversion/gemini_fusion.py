"""Tensors of the official two-stream MiT segmenters, and ours.

The code behind GeminiFusion (MiT), its DeLiVER branch and TokenFusion (JiaDingCN/GeminiFusion, yikaiw/TokenFusion)
shares one layout: weights of all modalities under `.module`, norms as `ln_0`, `ln_1`, keys and values packed. Ours hold
a norm's modalities as rows, and keys and values apart.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.conversion.gemini_units import unit_entries
from vitweave.modeling.conversion.mit_names import STREAMS, decoder_entries, mit_entries
from vitweave.modeling.conversion.modality_release import ModalityRelease, OfficialState
from vitweave.modeling.conversion.modality_sizes import decoder_fields, mit_stream, recipe_fields
from vitweave.modeling.conversion.name_table import NameEntry, NameTable, leaves

# official place in a score net of TokenFusion -> our layer
SCORE_LAYERS = {"0": "norm", "1": "fc1", "3": "fc2", "5": "fc3", "7": "fc4"}
# official place in a score net of the merged sensors -> our layer
AUXILIARY_LAYERS = {"0": "local", "1": "score"}
AUXILIARY_NET = r"(?:encoder|backbone)\.extra_score_predictor\.\d\.score_nets\.(\d)\..+"
NEVER_READ = "score net of a modality that does not exist: the released code holds one more than it reads"
LEFT_OVER = "score net of TokenFusion, left over: GeminiFusion's code does not run it"


def segmenter_entries(encoder: str, head: str) -> list[NameEntry]:
    """All entries of a segmenter whose names have these prefixes."""
    score = encoder + "score_predictor.{stage}.score_nets.{row}."
    auxiliary = encoder + "extra_score_predictor.{stage}.score_nets.{row}."
    stage = STREAMS + ".{stage}."
    return [
        *mit_entries(encoder, wrap=".module", norm=".ln_{row}"),
        *unit_entries(encoder + "block{number}.{block}.attn.", stage + "blocks.{block}.fusion."),
        *score_net_entries(score, stage + "fusion.score_net."),
        *(
            leaves(auxiliary + place, f"{stage}auxiliary.{layer}", join="cat")
            for place, layer in AUXILIARY_LAYERS.items()
        ),
        *decoder_entries(head),
        NameEntry("alpha", ("ensemble.alpha",)),
    ]


def score_net_entries(official: str, ours: str) -> list[NameEntry]:
    """The entries of TokenFusion's score nets of one stage, with these prefixes."""
    return [leaves(official + place, ours + layer) for place, layer in SCORE_LAYERS.items()]


SEGMENTER = NameTable(segmenter_entries("encoder.", "decoder."), "the official two-stream MiT segmenters")
DELIVER = NameTable(segmenter_entries("backbone.", "decode_head."), "GeminiFusion's segmenters of DeLiVER")
ANY = NameTable([*SEGMENTER.entries, *DELIVER.entries], SEGMENTER.subject)


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors of a `WeTr` / `GeminiFusion` segmenter to those of `ModalityFusionForSemanticSegmentation`.

    The last score net of every stage of a model of three or more modalities is dropped: nothing reads it.
    """
    unused = never_read(state)
    return ANY.to_ours({name: tensor for name, tensor in state.items() if name not in unused})


def never_read(names: Iterable[str]) -> dict[str, str]:
    """The score nets with the highest index, of which there is one more than modalities to score."""
    nets = {name: int(match[1]) for name in names if (match := re.fullmatch(AUXILIARY_NET, name))}
    return {name: NEVER_READ for name, index in nets.items() if index == max(nets.values())}


def left_over(names: Iterable[str]) -> dict[str, str]:
    """Score nets that GeminiFusion inherited from TokenFusion's code."""
    return {name: LEFT_OVER for name in names if name.startswith("encoder.score_predictor.")}


def never_read_nets(official: dict[str, Tensor], config: ModalityFusionConfig) -> dict[str, Tensor]:
    """Zeros for them, so that the official model loads strictly."""
    last = f".score_nets.{config.num_modalities - 2}."
    return {
        name.replace(last, f".score_nets.{config.num_modalities - 1}."): torch.zeros_like(tensor)
        for name, tensor in official.items()
        if ".extra_score_predictor." in name and last in name
    }


# Facts ---------------------------------------------------------------------------------------------------------------


def gemini_fields(state: OfficialState) -> dict:
    """GeminiFusion on NYUDv2 and SUN RGB-D."""
    fusion = {"fusion_type": "gemini", "fusion_options": {"num_heads": 8}}
    stream = mit_stream(state, "encoder.", ".module")
    return {"stream_config": stream, **fusion, **decoder_fields(state, "decoder."), **recipe_fields(state, "decoder.")}


def token_fusion_fields(state: OfficialState) -> dict:
    """TokenFusion on NYUDv2 and SUN RGB-D: a stream is scaled by its scores also where it is alone."""
    fusion = {"fusion_type": "token_exchange", "fusion_options": {"threshold": 0.02, "scale_alone": True}}
    return gemini_fields(state) | fusion


def deliver_fields(state: OfficialState) -> dict:
    """GeminiFusion on DeLiVER: all modalities but the first are merged; batch norm and ensemble are trained."""
    return {
        "stream_config": mit_stream(state, "backbone.", ".module"),
        "fusion_type": "gemini",
        "fusion_options": {"num_heads": 8},
        "auxiliary": "max",
        "losses": {"ohem_threshold": 1.0},
        **decoder_fields(state, "decode_head."),
    }


def modality_count(state: OfficialState) -> int:
    """Norms behind the first patch embedding."""
    pattern = r"(?:encoder|backbone)\.patch_embed1\.norm\.ln_\d\.weight"
    return sum(re.fullmatch(pattern, name) is not None for name in state.shapes)


GEMINI_FUSION = ModalityRelease(SEGMENTER, gemini_fields, modality_count, dropped=left_over)
GEMINI_FUSION_DELIVER = ModalityRelease(
    DELIVER,
    deliver_fields,
    modality_count,
    modalities=("rgb", "depth", "event", "lidar"),
    dropped=never_read,
    restored=never_read_nets,
)
TOKEN_FUSION = ModalityRelease(SEGMENTER, token_fusion_fields, modality_count)

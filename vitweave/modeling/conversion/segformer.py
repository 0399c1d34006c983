"""Tensors of SegFormer (arXiv:2105.15203) and of its encoder MiT as NVlabs/SegFormer stores them, and ours.

They are of one image. A model of several modalities takes the same weights for all, a norm of its own for each.
"""

from collections.abc import Iterable

from vitweave.modeling.conversion.mit_names import STREAMS, decoder_entries, mit_entries
from vitweave.modeling.conversion.modality_release import ModalityRelease, OfficialState
from vitweave.modeling.conversion.modality_sizes import decoder_fields, mit_stream
from vitweave.modeling.conversion.name_table import NameTable

NEVER_RUN = "classifier that every decoder of that code has, which this one does not run"
IMAGENET = "classifier of ImageNet, not part of the encoder"

SEGFORMER_TABLE = NameTable([*mit_entries("backbone.", join="copy"), *decoder_entries("decode_head.")], "SegFormer")
MIT_TABLE = NameTable(mit_entries("", join="copy", streams=STREAMS.removeprefix("modality_fusion.")), "a MiT")


def mit_fields(state: OfficialState, root: str = "") -> dict:
    """One modality unless more are asked for, side by side."""
    return {"stream_config": mit_stream(state, root), "conv_norm_eps": 1e-5, "fusion_type": None, "ensemble": "mean"}


def segformer_fields(state: OfficialState) -> dict:
    """The whole segmenter."""
    return mit_fields(state, "backbone.") | decoder_fields(state, "decode_head.")


def unused_classifier(names: Iterable[str]) -> dict[str, str]:
    """Of the decoder's base class."""
    return {name: NEVER_RUN for name in names if name.startswith("decode_head.conv_seg.")}


def imagenet_classifier(names: Iterable[str]) -> dict[str, str]:
    """Of the pretraining."""
    return {name: IMAGENET for name in names if name.startswith("head.")}


SEGFORMER = ModalityRelease(
    SEGFORMER_TABLE, segformer_fields, lambda state: 1, dropped=unused_classifier, fusion_is_new=True
)
MIT = ModalityRelease(
    MIT_TABLE, mit_fields, lambda state: 1, dropped=imagenet_classifier, has_decoder=False, fusion_is_new=True
)

"""The modality fusions by name."""

from vitweave.modeling.modality_fusion.base import ModalityFusion
from vitweave.modeling.modality_fusion.channel_exchange import ChannelExchangeFusion
from vitweave.modeling.modality_fusion.cross_attention import CrossAttentionFusion
from vitweave.modeling.modality_fusion.gemini import GeminiFusion
from vitweave.modeling.modality_fusion.rectify_fuse import RectifyFuseFusion
from vitweave.modeling.modality_fusion.stage_controls import AdditionFusion, ConcatenationFusion
from vitweave.modeling.modality_fusion.token_exchange import TokenExchangeFusion
from vitweave.modeling.options import check_options, pick

MODALITY_FUSIONS: dict[str, type[ModalityFusion]] = {
    "addition": AdditionFusion,
    "channel_exchange": ChannelExchangeFusion,
    "concatenation": ConcatenationFusion,
    "cross_attention": CrossAttentionFusion,
    "gemini": GeminiFusion,
    "rectify_fuse": RectifyFuseFusion,
    "token_exchange": TokenExchangeFusion,
}


def build_modality_fusion(
    name: str, num_modalities: int, hidden_size: int, options: dict | None = None
) -> ModalityFusion:
    """Build a fusion of so many streams; `options` are its constructor's arguments."""
    fusion_class = pick(MODALITY_FUSIONS, name, "fusion_type")
    options = options or {}
    given = ("num_modalities", "hidden_size")
    check_options(fusion_class, options, given=given, owner=f"the modality fusion {name!r}")
    return fusion_class(num_modalities, hidden_size, **options)

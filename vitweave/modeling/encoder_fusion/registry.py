"""The encoder fusions by name."""

from collections.abc import Sequence

from vitweave.configuration.encoder_fusion_plans import Grid
from vitweave.modeling.encoder_fusion.add import AddFusion
from vitweave.modeling.encoder_fusion.base import EncoderFusion
from vitweave.modeling.encoder_fusion.channel_concat import ChannelConcatFusion
from vitweave.modeling.encoder_fusion.deformable import DeformableFusion
from vitweave.modeling.encoder_fusion.mixture_of_resolution import MixtureOfResolutionFusion
from vitweave.modeling.encoder_fusion.patch_info_mining import PatchInfoMiningFusion
from vitweave.modeling.encoder_fusion.query_former import QueryFormerFusion
from vitweave.modeling.encoder_fusion.sequence_concat import SequenceConcatFusion
from vitweave.modeling.encoder_fusion.spatial_vision_aggregator import SpatialVisionAggregatorFusion
from vitweave.modeling.options import check_options, pick

ENCODER_FUSIONS: dict[str, type[EncoderFusion]] = {
    "add": AddFusion,
    "channel_concat": ChannelConcatFusion,
    "deformable": DeformableFusion,
    "mixture_of_resolution": MixtureOfResolutionFusion,
    "patch_info_mining": PatchInfoMiningFusion,
    "query_former": QueryFormerFusion,
    "sequence_concat": SequenceConcatFusion,
    "spatial_vision_aggregator": SpatialVisionAggregatorFusion,
}


def build_encoder_fusion(
    name: str,
    in_channels: Sequence[int],
    grids: Sequence[Grid],
    hidden_size: int | None = None,
    options: dict | None = None,
) -> EncoderFusion:
    """Build a fusion of encoders with these channels and grids; `options` are its constructor's arguments."""
    fusion_class = pick(ENCODER_FUSIONS, name, "fusion_type")
    options = options or {}
    given = ("in_channels", "grids", "hidden_size")
    check_options(fusion_class, options, given=given, owner=f"the encoder fusion {name!r}")
    return fusion_class(in_channels, grids, hidden_size, **options)

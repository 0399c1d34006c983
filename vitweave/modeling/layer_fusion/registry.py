"""The layer fusions by name."""

from vitweave.modeling.layer_fusion.aspp import AsppFusion
from vitweave.modeling.layer_fusion.attentive_probe import AttentiveProbeFusion
from vitweave.modeling.layer_fusion.base import LayerFusion
from vitweave.modeling.layer_fusion.concat import ConcatFusion
from vitweave.modeling.layer_fusion.cross_layer_attention import CrossLayerAttentionFusion
from vitweave.modeling.layer_fusion.efficient_attention import EfficientAttentionFusion
from vitweave.modeling.layer_fusion.film import FilmFusion
from vitweave.modeling.layer_fusion.fpn import FpnFusion
from vitweave.modeling.layer_fusion.gated_sum import GatedSumFusion
from vitweave.modeling.layer_fusion.graph import GraphFusion
from vitweave.modeling.layer_fusion.layer_self_attention import LayerSelfAttentionFusion
from vitweave.modeling.layer_fusion.recurrent import RecurrentFusion
from vitweave.modeling.layer_fusion.weighted_sum import WeightedSumFusion
from vitweave.modeling.options import check_options, pick

LAYER_FUSIONS: dict[str, type[LayerFusion]] = {
    "aspp": AsppFusion,
    "attentive_probe": AttentiveProbeFusion,
    "concat": ConcatFusion,
    "cross_layer_attention": CrossLayerAttentionFusion,
    "efficient_attention": EfficientAttentionFusion,
    "film": FilmFusion,
    "fpn": FpnFusion,
    "gated_sum": GatedSumFusion,
    "graph": GraphFusion,
    "layer_self_attention": LayerSelfAttentionFusion,
    "recurrent": RecurrentFusion,
    "weighted_sum": WeightedSumFusion,
}


def build_layer_fusion(name: str, num_layers: int, hidden_size: int, options: dict | None = None) -> LayerFusion:
    """Build a fusion of `num_layers` layers; `options` are its constructor's arguments."""
    fusion_class = pick(LAYER_FUSIONS, name, "fusion_type")
    options = options or {}
    check_options(fusion_class, options, given=("num_layers", "hidden_size"), owner=f"the layer fusion {name!r}")
    return fusion_class(num_layers, hidden_size, **options)

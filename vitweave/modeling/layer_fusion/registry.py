"""The layer fusions by name."""

from vitweave.modeling.layer_fusion.base import LayerFusion
from vitweave.modeling.layer_fusion.weighted_sum import WeightedSumFusion
from vitweave.modeling.options import check_options, pick

LAYER_FUSIONS: dict[str, type[LayerFusion]] = {
    "weighted_sum": WeightedSumFusion,
}


def build_layer_fusion(name: str, num_layers: int, hidden_size: int, options: dict | None = None) -> LayerFusion:
    """Build a fusion of `num_layers` layers; `options` are its constructor's arguments."""
    fusion_class = pick(LAYER_FUSIONS, name, "fusion_type")
    options = options or {}
    check_options(fusion_class, options, given=("num_layers", "hidden_size"), owner=f"the layer fusion {name!r}")
    return fusion_class(num_layers, hidden_size, **options)

"""The segmentation heads by name."""

from vitweave.modeling.heads.base import SegmentationHead
from vitweave.modeling.heads.linear import LinearHead
from vitweave.modeling.heads.mlp import MlpHead
from vitweave.modeling.heads.subpixel import SubpixelHead
from vitweave.modeling.options import check_options, pick

SEGMENTATION_HEADS: dict[str, type[SegmentationHead]] = {
    "linear": LinearHead,
    "mlp": MlpHead,
    "subpixel": SubpixelHead,
}


def build_segmentation_head(
    name: str, in_channels: list[int], num_labels: int, options: dict | None = None
) -> SegmentationHead:
    """Build a head for maps of `in_channels` (one entry per map); `options` are its constructor's arguments."""
    head_class = pick(SEGMENTATION_HEADS, name, "head_type")
    options = options or {}
    check_options(head_class, options, given=("in_channels", "num_labels"), owner=f"the head {name!r}")
    return head_class(in_channels, num_labels, **options)

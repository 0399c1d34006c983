"""The heads by name."""

from torch import nn

from vitweave.modeling.heads.attentive_probe import AttentiveProbe
from vitweave.modeling.heads.base import DepthHead, SegmentationHead
from vitweave.modeling.heads.depth_bins import DepthBinsHead
from vitweave.modeling.heads.dpt import DptHead
from vitweave.modeling.heads.linear import LinearHead
from vitweave.modeling.heads.mlp import MlpHead
from vitweave.modeling.heads.regression import RegressionHead
from vitweave.modeling.heads.subpixel import SubpixelHead
from vitweave.modeling.options import check_options, pick

SEGMENTATION_HEADS: dict[str, type[SegmentationHead]] = {
    "linear": LinearHead,
    "mlp": MlpHead,
    "subpixel": SubpixelHead,
}
DEPTH_HEADS: dict[str, type[DepthHead]] = {
    "dpt": DptHead,
    "linear": DepthBinsHead,
    "regression": RegressionHead,
}
# tokens (batch, tokens, hidden) to logits (batch, num_labels)
TOKEN_CLASSIFIERS: dict[str, type[nn.Module]] = {"attentive": AttentiveProbe}


def build_segmentation_head(
    name: str, in_channels: list[int], num_labels: int, options: dict | None = None
) -> SegmentationHead:
    """Build a head for maps of `in_channels` (one entry per map); `options` are its constructor's arguments."""
    head_class = pick(SEGMENTATION_HEADS, name, "head_type")
    options = options or {}
    check_options(head_class, options, given=("in_channels", "num_labels"), owner=f"the head {name!r}")
    return head_class(in_channels, num_labels, **options)


def build_depth_head(
    name: str,
    in_channels: list[int],
    depth_target: str,
    min_depth: float,
    max_depth: float,
    options: dict | None = None,
) -> DepthHead:
    """Build a depth head for maps of `in_channels` (one entry per map), with the range of its values."""
    head_class = pick(DEPTH_HEADS, name, "head_type of a depth model")
    value_range = {"depth_target": depth_target, "min_depth": min_depth, "max_depth": max_depth}
    options = options or {}
    check_options(head_class, options, given=("in_channels", *value_range), owner=f"the head {name!r}")
    return head_class(in_channels, **value_range, **options)


def build_token_classifier(name: str, hidden_size: int, num_labels: int, options: dict | None = None) -> nn.Module:
    """Build a classifier on tokens of `hidden_size`; `options` are its constructor's arguments."""
    head_class = pick(TOKEN_CLASSIFIERS, name, "token classifier")
    options = options or {}
    check_options(head_class, options, given=("hidden_size", "num_labels"), owner=f"the token classifier {name!r}")
    return head_class(hidden_size, num_labels, **options)

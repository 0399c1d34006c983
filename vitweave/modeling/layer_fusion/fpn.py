"""Pyramids of feature maps from the layers of a plain ViT."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitweave.modeling.dpt_neck import DptNeck
from vitweave.modeling.layer_fusion.base import FusedTokens, LayerFusion, LayerTokens, check_choice
from vitweave.modeling.masked_maps import mask_at, mask_to_map, masked_mean, zero_masked
from vitweave.modeling.pyramids import FeaturePyramid, Resample, SimpleFeaturePyramid, check_scales, coarser_level
from vitweave.modeling.tokens import tokens_to_map

Levels = tuple[list[Tensor], list[Tensor | None]]  # maps fine to coarse, and the mask of each

DEFAULT_SCALES = {"fpn": (2, 1, 0.5), "last": (4, 2, 1, 0.5), "dpt": (4, 2, 1, 0.5)}


class FpnFusion(LayerFusion):
    """Shallow layers make the fine levels of a pyramid, deep layers the coarse ones: `p_1 ... p_K`.

    The embedding gets `W [mean p_1; ...; mean p_K] + b`; the maps come out as `feature_maps`, fine to coarse, from the
    start (only the embedding is a residual); the patches stay as they are.

    "fpn" (arXiv:1612.03144): the layer of each level is resampled, and a top-down path of nearest neighbours adds the
    coarse levels to the fine ones. "last" (ViTDet, arXiv:2203.16527): every level from the deepest layer, no top-down
    path. "dpt" (arXiv:2103.13413): each layer with its [CLS] read in, resampled and refined from coarse to fine; every
    map comes out at twice its scale, and masked patches are zero at the start but not between its convolutions.
    Max-pooling drops an odd last row or column, and upsampling goes to the exact size of the finer level.

    Args:
        scales: size of each level over that of the patch grid, out of 4, 2, 1 and 0.5, fine to coarse.
        layer_of_level: which of the selected layers (from 0) makes each level; None spreads them evenly. Not of "last".
        extra_level: one more map, every second position of the coarsest, as detectors use it.
        cls_readout: "dpt" only, "ignore", "add" or "project" (the default) the [CLS] of the layer.
        neck_sizes: "dpt" only, channels of each level before refinement; None halves the width from level to level.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        style: str = "fpn",
        out_channels: int = 256,
        scales: Sequence[float] | None = None,
        layer_of_level: Sequence[int] | None = None,
        extra_level: bool = False,
        cls_readout: str | None = None,
        neck_sizes: Sequence[int] | None = None,
        norm: str = "per_layer",
        direct: bool = False,
    ):
        check_choice("style", style, DEFAULT_SCALES)
        if style != "dpt" and (cls_readout is not None or neck_sizes is not None):
            raise ValueError(f"cls_readout and neck_sizes belong to style='dpt', got them with style={style!r}")
        cls_readout = cls_readout or "project"
        reads_cls = style == "dpt" and cls_readout != "ignore"
        needs = ("cls", "patches") if reads_cls else ("patches",)
        super().__init__(num_layers, hidden_size, needs=needs, norm=norm, direct=direct)
        scales = DEFAULT_SCALES[style] if scales is None else tuple(scales)
        check_scales(scales)
        self.style, self.reads_cls, self.extra_level = style, reads_cls, extra_level
        self.map_channels = (out_channels,) * (len(scales) + extra_level)
        self.layer_of_level = level_layers(num_layers, len(scales), style, layer_of_level)
        self.drop_unread_norms()
        if style == "last":
            self.pyramid = SimpleFeaturePyramid(hidden_size, out_channels, scales)
        elif style == "dpt":
            widths = [hidden_size] * len(scales)
            self.pyramid = DptNeck(widths, neck_sizes, out_channels, factors=scales, readout=cls_readout)
        else:
            self.resample = nn.ModuleList(Resample(hidden_size, scale) for scale in scales)
            self.pyramid = FeaturePyramid([hidden_size] * len(scales), out_channels)
        self.proj = nn.Linear(len(scales) * out_channels, hidden_size)

    def drop_unread_norms(self) -> None:
        """Layers that make no level get no norm: nothing would ever train it."""
        for norms in (getattr(self, "norm_cls", None), getattr(self, "norm_patch", None)):
            for layer in set(range(self.num_layers if norms is not None else 0)) - set(self.layer_of_level):
                norms[layer] = nn.Identity()

    def forward(self, tokens: LayerTokens, output_attentions: bool = False) -> FusedTokens:
        mask = mask_to_map(tokens.patch_mask, tokens.grid)
        maps = {layer: self.layer_map(tokens, layer, mask) for layer in self.layer_of_level}
        maps = [maps[layer] for layer in self.layer_of_level]
        levels, masks = {"fpn": self.top_down, "last": self.simple, "dpt": self.refined}[self.style](maps, mask, tokens)
        means = [masked_mean(level, level_mask).flatten(1) for level, level_mask in zip(levels, masks, strict=True)]
        pooled = self.residual("global", tokens.base_cls, self.proj(torch.cat(means, dim=1)))
        extra = [coarser_level(levels[-1])] if self.extra_level else []
        return FusedTokens(pooled=pooled, feature_maps=(*levels, *extra))

    def layer_map(self, tokens: LayerTokens, layer: int, mask: Tensor | None) -> Tensor:
        """One layer's normed patches as a map, zero where masked."""
        patches = tokens.patches[:, layer]
        patches = self.norm_patch[layer](patches) if self.norm_kind == "per_layer" else patches
        return zero_masked(tokens_to_map(patches, tokens.grid), mask)

    def top_down(self, maps: list[Tensor], mask: Tensor | None, tokens: LayerTokens) -> Levels:
        """The levels of "fpn" and their masks."""
        resampled = [resample(level, mask) for resample, level in zip(self.resample, maps, strict=True)]
        maps, masks = zip(*resampled, strict=True)
        return self.pyramid(maps, masks), list(masks)

    def simple(self, maps: list[Tensor], mask: Tensor | None, tokens: LayerTokens) -> Levels:
        """The levels of "last" and their masks."""
        return self.pyramid(maps[-1], mask)

    def refined(self, maps: list[Tensor], mask: Tensor | None, tokens: LayerTokens) -> Levels:
        """The levels of "dpt" and their masks."""
        class_tokens = None
        if self.reads_cls:
            cls = self.normed_cls(tokens)
            class_tokens = [cls[:, layer] for layer in self.layer_of_level]
        levels = self.pyramid(maps, class_tokens)[::-1]
        masks = [mask_at(mask, level.shape[-2:], level.dtype) for level in levels]
        return [zero_masked(level, level_mask) for level, level_mask in zip(levels, masks, strict=True)], masks


def level_layers(num_layers: int, num_levels: int, style: str, chosen: Sequence[int] | None) -> tuple[int, ...]:
    """Which of the selected layers makes each level, fine to coarse."""
    if style == "last":
        if chosen is not None:
            raise ValueError(f"style='last' makes every level from the deepest layer, got layer_of_level={chosen}")
        return (num_layers - 1,) * num_levels
    if chosen is None:
        return tuple(round(k * (num_layers - 1) / max(1, num_levels - 1)) for k in range(num_levels))
    if len(chosen) != num_levels or any(not 0 <= layer < num_layers for layer in chosen):
        raise ValueError(f"expected {num_levels} layers from 0 to {num_layers - 1}, one per level, got {list(chosen)}")
    return tuple(chosen)

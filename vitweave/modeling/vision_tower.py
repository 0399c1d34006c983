"""What a dual encoder reads of its vision model: one vector, and maps to cut tiles from."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitweave.modeling.encoded_images import EncodedImages, check_encoded, encode_features, grid_of, read_layers
from vitweave.modeling.tile_alignment import resized_mask
from vitweave.modeling.tokens import tokens_to_map
from vitweave.modeling.vision_encoder import VisionEncoder

LAYER_FUSION = "layer_fusion_vision"


@dataclass
class TowerOutput:
    """What the tower says about a batch of images.

    Args:
        pooled: (batch, pooled size).
        tokens: (batch, tokens, hidden), class tokens, registers and patches after the final norm.
        maps: (batch, channels, height, width), one per level of tiles.
        masks: (batch, height, width) of each map, True = valid, or None.
        hidden_states: every layer, on request.
        attentions: of a layer fusion, where it attends, or of every block; on request.
    """

    pooled: Tensor
    tokens: Tensor
    maps: tuple[Tensor, ...] = ()
    masks: tuple[Tensor | None, ...] = ()
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class VisionTower:
    """Reads a vision model or a layer fusion; no module, so the model keeps the names its owner gives it.

    Args:
        levels: how many levels of tiles there are.
        source: "patches" or "maps", as in `ImageTextRetrieverConfig.tile_source`.
    """

    def __init__(self, model: PreTrainedModel, levels: int, source: str):
        self.model, self.levels, self.source = model, levels, source
        self.is_fused = model.config.model_type == LAYER_FUSION
        self.encoder = model.encoder if self.is_fused else VisionEncoder(model, final_norm=False, keep_final=True)
        if source == "maps":
            found = len(model.fusion.map_channels) if self.is_fused else 0
            if found != levels:
                raise ValueError(
                    f"expected one feature map per level of tiles, {levels}, got {found} from {type(model).__name__};"
                    ' tile_source="maps" needs a layer fusion with a pyramid (fpn), and as many tile_levels as it has'
                    ' maps; tile_source="patches" works with any encoder that has patches'
                )

    @property
    def pooled_size(self) -> int:
        return self.model.fusion.hidden_size if self.is_fused else self.encoder.facts.pooled_size

    @property
    def map_channels(self) -> list[int]:
        """Channels of the map of each level."""
        if self.source == "maps":
            return list(self.model.fusion.map_channels)
        return [self.encoder.facts.hidden_sizes[-1]] * self.levels

    def run(
        self,
        pixel_values: Tensor,
        patch_mask: Tensor | None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> TowerOutput:
        """Encode (batch, channels, height, width); patch_mask is (batch, patches), True = valid.

        What is asked for beside that may also be asked for by the vision model's config. Attentions of a model that is
        no layer fusion take a second run, of its own forward.
        """
        config, attentions, maps = self.model.config, None, None
        asks_attentions = config.output_attentions if output_attentions is None else output_attentions
        asks_states = bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        if self.is_fused:
            features, _, fused = self.model.fuse(pixel_values, patch_mask, asks_attentions, asks_states)
            pooled, patches, maps = fused.pooled, fused.patches, fused.feature_maps
            attentions = None if fused.attentions is None else (fused.attentions,)
        else:
            features = self.encoder(pixel_values, all_layers=asks_states)
            pooled, patches = features.pooled, None
            if asks_attentions:
                attentions = self.model(pixel_values, output_attentions=True, return_dict=True).attentions
        patches = features.final[2] if patches is None else patches
        output = self.output(
            pooled, torch.cat(features.final[:2], dim=1), patches, maps, features.grids[-1], patch_mask
        )
        output.hidden_states, output.attentions = features.states if asks_states else None, attentions
        return output

    def output(
        self,
        pooled: Tensor,
        prefix: Tensor,
        patches: Tensor | None,
        maps: tuple[Tensor, ...] | None,
        grid: tuple[int, int],
        patch_mask: Tensor | None,
    ) -> TowerOutput:
        """What is read of the tower's pooled vector, prefix tokens, patches and maps; without patches it has no maps
        of them."""
        if patches is None:
            return TowerOutput(pooled, prefix)
        if patch_mask is not None and patch_mask.shape != patches.shape[:2]:
            raise ValueError(
                f"expected a patch_mask (batch, patches) = {tuple(patches.shape[:2])} for a grid of"
                f" {grid[0]}x{grid[1]}, got {tuple(patch_mask.shape)}"
            )
        if self.source == "patches" or not maps:
            maps = (tokens_to_map(patches, grid),) * self.levels
        return TowerOutput(
            pooled=pooled,
            tokens=torch.cat([prefix, patches], dim=1),
            maps=maps,
            masks=tuple(resized_mask(patch_mask, grid, level.shape[-2:]) for level in maps),
        )

    def encode(
        self,
        pixel_values: Tensor,
        patch_mask: Tensor | None = None,
        needs: Collection[str] | None = None,
        tiles: bool = False,
    ) -> EncodedImages:
        """What is read of a frozen encoder, for `run_encoded`.

        Args:
            needs: of a layer fusion; None is what the tower's own reads.
            tiles: keep the patches that tiles are cut from.
        """
        features, tokens = self.encoder(pixel_values), None
        needs = self.needs if needs is None else needs
        if self.is_fused:
            fusion = self.model.fusion
            tokens = read_layers(features, self.model.config.layers, fusion.hidden_size, needs, patch_mask)
        return encode_features(features, tokens, patch_mask, base_patches=tiles or "patches" in needs)

    @property
    def needs(self) -> frozenset[str]:
        """What the layer fusion reads; nothing without one."""
        return self.model.fusion.needs if self.is_fused else frozenset()

    def run_encoded(self, encoded: EncodedImages, tiles: bool = False) -> TowerOutput:
        """`run`, from what `encode` returned for the images.

        Args:
            tiles: tiles will be cut; refuses features without the patches for them.
        """
        check_encoded(encoded, ["base_patches"] if tiles else [])
        pooled, patches, maps = encoded["pooled"], None, None
        if self.is_fused:
            fused = self.model.fuse_encoded(encoded)[1]
            pooled, patches, maps = fused.pooled, fused.patches, fused.feature_maps
        patches = encoded.get("base_patches") if patches is None else patches
        return self.output(pooled, encoded["prefix"], patches, maps, grid_of(encoded), encoded.get("patch_mask"))

"""What a dual encoder reads of its vision model: one vector, and maps to cut tiles from."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitweave.modeling.own_models import OWN_MODELS
from vitweave.modeling.tile_alignment import resized_mask
from vitweave.modeling.tokens import tokens_to_map
from vitweave.modeling.vision_encoder import VisionEncoder, find_vision_model

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
        grid = features.grids[-1]
        if patch_mask is not None and patch_mask.shape != patches.shape[:2]:
            raise ValueError(
                f"expected a patch_mask (batch, patches) = {tuple(patches.shape[:2])} for a grid of"
                f" {grid[0]}x{grid[1]}, got {tuple(patch_mask.shape)}"
            )
        if self.source == "patches" or not maps:
            maps = (tokens_to_map(patches, grid),) * self.levels
        return TowerOutput(
            pooled=pooled,
            tokens=torch.cat([*features.final[:2], patches], dim=1),
            maps=maps,
            masks=tuple(resized_mask(patch_mask, grid, level.shape[-2:]) for level in maps),
            hidden_states=features.states if asks_states else None,
            attentions=attentions,
        )


def find_tower(model: PreTrainedModel) -> PreTrainedModel:
    """The layer fusion or vision model in `model`: of a classifier its base, of CLIP its vision part."""
    for part in model.modules():
        if isinstance(part, OWN_MODELS[LAYER_FUSION]()["model"]):
            return part
    return find_vision_model(model)

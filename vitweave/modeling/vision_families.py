"""How each kind of transformers vision model is run layer by layer: one small class per kind, one line per model type.

A family reads few inner names of a native model (its embeddings, its list of blocks, its final norm); the tests hold
each of them against the native outputs at the oldest and the newest supported transformers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from vitweave.configuration.encoder_facts import EncoderFacts
from vitweave.configuration.encoder_facts import encoder_facts
from vitweave.modeling.own_models import OWN_MODELS
from vitweave.modeling.tokens import by_role
from vitweave.modeling.tokens import tokens_to_map


class VisionFamily:
    """A ViT: embeddings, blocks, final norm. The other families say what is different with them."""

    embeddings = "embeddings"
    blocks = "layers"
    final_norm: str | None = "layernorm"
    norm_fits_every_layer = True  # False: the final norm belongs to the last layer only (hierarchical models)

    def model_classes(self, config: PreTrainedConfig) -> type[PreTrainedModel] | tuple[type[PreTrainedModel], ...]:
        """The classes this family can run."""
        return MODEL_MAPPING[type(config)]

    def facts(self, model: PreTrainedModel) -> EncoderFacts:
        return encoder_facts(model.config)

    def check_size(self, model: PreTrainedModel, height: int, width: int):
        """Refuse image sizes the native model cannot take."""

    def run(
        self,
        model: PreTrainedModel,
        facts: EncoderFacts,
        pixel_values: Tensor,
        layers: tuple[int, ...],
        final_norm: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        """The layers asked for, each (batch, tokens, hidden) or (batch, hidden, height, width), and the pooled output."""
        kept = {}
        for layer, hidden_states in zip(range(max(layers) + 1), self.layers(model, pixel_values), strict=False):
            if layer in layers:
                kept[layer] = hidden_states
        return self.finish(model, facts, [kept[layer] for layer in layers], layers, final_norm)

    def finish(
        self,
        model: PreTrainedModel,
        facts: EncoderFacts,
        states: list[Tensor],
        layers: tuple[int, ...],
        final_norm: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Apply the final norm where it was asked for, and pool the last layer if it is there."""
        finished, pooled = [], None
        for layer, hidden_states in zip(layers, states, strict=True):
            is_last = layer == facts.num_layers
            if is_last or (final_norm and self.norm_fits_every_layer):
                normed = self.norm(model, hidden_states)
                pooled = self.pool(model, hidden_states, normed) if is_last else pooled
                hidden_states = normed if final_norm else hidden_states
            finished.append(hidden_states)
        return finished, pooled

    def layers(self, model: PreTrainedModel, pixel_values: Tensor) -> Iterator[Tensor]:
        """Layer after layer, the embeddings first; a caller that stops asking stops the model.

        Yields (batch, tokens, hidden), or (batch, hidden, height, width) in families without leading tokens.
        """
        hidden_states = self.embed(model, pixel_values)
        yield hidden_states
        options = self.block_options(model, pixel_values)
        for block in model.get_submodule(self.blocks):
            hidden_states = block(hidden_states, **options)
            yield hidden_states

    def embed(self, model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
        return model.get_submodule(self.embeddings)(pixel_values)

    def block_options(self, model: PreTrainedModel, pixel_values: Tensor) -> dict:
        return {}

    def norm(self, model: PreTrainedModel, hidden_states: Tensor) -> Tensor:
        """The model's final norm, on what the model itself applies it to."""
        return hidden_states if self.final_norm is None else model.get_submodule(self.final_norm)(hidden_states)

    def pool(self, model: PreTrainedModel, hidden_states: Tensor, normed: Tensor) -> Tensor:
        """(batch, pooled size): the model's own pooler output; without one, the class token after the final norm.

        Args:
            hidden_states: the last layer.
            normed: the last layer after the final norm.
        """
        pooler = getattr(model, "pooler", None)
        return normed[:, 0] if pooler is None else pooler(normed)


class ResizedViT(VisionFamily):
    """ViTs that take another image size only when told to interpolate their position embeddings."""

    def embed(self, model, pixel_values):
        return model.embeddings(pixel_values, interpolate_pos_encoding=True)


class PatchMean(ResizedViT):
    """I-JEPA: no class token; where there is no pooler, the mean of the patches is the pooled output."""

    def pool(self, model, hidden_states, normed):
        return normed.mean(dim=1) if model.pooler is None else model.pooler(normed)


class Dinov2(VisionFamily):
    """DINOv2 with and without registers, InternViT: they interpolate by themselves."""

    blocks = "encoder.layer"


class Dinov3(VisionFamily):
    """DINOv3: rotary position embeddings, computed once from the image size."""

    blocks = "model.layer"
    final_norm = "norm"

    def block_options(self, model, pixel_values):
        return {"position_embeddings": model.rope_embeddings(pixel_values)}


class Beit(VisionFamily):
    """BEiT: relative position bias, one per block or one for all; mean-pooled ones norm the pooled output only."""

    def block_options(self, model, pixel_values):
        resolution = tuple(pixel_values.shape[-2:])
        if model.shared_position_bias is None:
            return {"resolution": resolution}
        window = tuple(size // model.config.patch_size for size in resolution)
        return {"resolution": resolution, "attention_mask": model.shared_position_bias(window)}


class Clip(ResizedViT):
    """CLIP: a norm before the blocks; the final norm is for the class token only, the patches stay as they are."""

    blocks = "encoder.layers"

    def embed(self, model, pixel_values):
        return model.pre_layrnorm(super().embed(model, pixel_values))

    def block_options(self, model, pixel_values):
        return {"attention_mask": None}

    def norm(self, model, hidden_states):
        return torch.cat([model.post_layernorm(hidden_states[:, :1]), hidden_states[:, 1:]], dim=1)


class Siglip(ResizedViT):
    """SigLIP: no class token; an attention head pools the patches, and where it is left out, their mean."""

    blocks = "encoder.layers"
    final_norm = "post_layernorm"

    def block_options(self, model, pixel_values):
        return {"attention_mask": None}

    def pool(self, model, hidden_states, normed):
        return model.head(normed) if model.use_head else normed.mean(dim=1)


class Siglip2(Siglip):
    """SigLIP 2 (NaFlex): takes patches with their grid; a batch of images of one size is cut into them here."""

    def embed(self, model, pixel_values):
        embeddings = model.embeddings
        size = embeddings.patch_size
        grid = pixel_values.shape[-2] // size, pixel_values.shape[-1] // size
        patches = pixel_values[..., : grid[0] * size, : grid[1] * size]
        patches = patches.unflatten(-2, (grid[0], size)).unflatten(-1, (grid[1], size))
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (batch, patches, size * size * channels)
        side = embeddings.position_embedding_size
        table = embeddings.position_embedding.weight.unflatten(0, (side, side)).permute(2, 0, 1)[None]
        # float32, because resizing with antialias knows no half precision on CPU
        table = F.interpolate(table.float(), size=grid, mode="bilinear", align_corners=False, antialias=True)
        return embeddings.patch_embedding(patches) + table.flatten(2).transpose(1, 2).to(patches.dtype)


class Mae(VisionFamily):
    """ViT-MAE: its embedding drops and shuffles patches for pre-training; as an encoder it sees all, in order."""

    def embed(self, model, pixel_values):
        embeddings = model.embeddings
        patches = embeddings.patch_embeddings(pixel_values, interpolate_pos_encoding=True)
        positions = embeddings.interpolate_pos_encoding(patches, *pixel_values.shape[-2:])
        cls = (embeddings.cls_token + positions[:, :1]).expand(len(patches), -1, -1)
        return torch.cat([cls, patches + positions[:, 1:]], dim=1)


class Specialized(VisionFamily):
    """Our specialised ViT stops and keeps by itself; its class-attention layers, if any, belong to the last layer."""

    def model_classes(self, config):
        return OWN_MODELS[config.model_type]()["model"]

    def run(self, model, facts, pixel_values, layers, final_norm):
        hidden_states, grid = model.embed(pixel_values)
        last = facts.num_layers
        keep = tuple(layer for layer in layers if layer != last)
        outputs = model.encoder(hidden_states, grid, keep=keep, stop_at=None if last in layers else max(layers))
        kept = {**dict(zip(keep, outputs.kept, strict=True)), last: outputs.last_hidden_state}
        return self.finish(model, facts, [kept[layer] for layer in layers], layers, final_norm)

    def norm(self, model, hidden_states):
        if model.config.final_norm == "pooled" and model.config.pooling == "cls":  # as CLIP
            cls = by_role(model, "layernorm", 1, hidden_states[:, :1])
            return torch.cat([cls, hidden_states[:, 1:]], dim=1)
        return model.pool(hidden_states)[0]

    def pool(self, model, hidden_states, normed):
        return model.pool(hidden_states)[1]


class Radio(VisionFamily):
    """RADIO: normalises the pixels itself, has no final norm, and pools to the summary tokens side by side."""

    blocks = "encoder.layer"
    final_norm = None

    def check_size(self, model, height, width):
        size = model.config.patch_size
        if height % size or width % size:
            raise ValueError(
                f"expected an image of whole patches of {size}x{size} pixels, got {height}x{width}; RADIO neither crops"
                " nor pads, resize the image first"
            )

    def embed(self, model, pixel_values):
        return model.embeddings(model.input_conditioner(pixel_values))

    def pool(self, model, hidden_states, normed):
        return hidden_states[:, model.summary_idxs].flatten(1)


class MapFamily(VisionFamily):
    """Models whose layers are maps (batch, hidden, height, width) without leading tokens."""

    final_norm = None
    norm_fits_every_layer = False

    def pool(self, model, hidden_states, normed):
        return normed.mean(dim=(-2, -1))


class ConvNext(MapFamily):
    """ConvNeXt: layer n is stage n, layer 0 the stem; the final norm acts on the pooled output only."""

    blocks = "encoder.stages"

    def pool(self, model, hidden_states, normed):
        return model.layernorm(hidden_states.mean(dim=(-2, -1)))


class Dinov3ConvNext(MapFamily):
    """DINOv3 ConvNeXt: layer n is stage n, the stem is a part of stage 1; one norm for the pooled mean and the patches."""

    blocks = "model.stages"
    final_norm = "layer_norm"

    def embed(self, model, pixel_values):
        return pixel_values

    def norm(self, model, hidden_states):
        return model.layer_norm(hidden_states.movedim(1, -1)).movedim(-1, 1)

    def pool(self, model, hidden_states, normed):
        return model.layer_norm(hidden_states.mean(dim=(-2, -1)))


class Segformer(MapFamily):
    """SegFormer / MiT: layer n is stage n after its own norm; overlapping patches open every stage, so no layer 0."""

    blocks = "stages"

    def layers(self, model, pixel_values):
        hidden_states = pixel_values
        yield hidden_states
        for stage in model.stages:
            hidden_states, height, width = stage.patch_embeddings(hidden_states)
            for block in stage.blocks:
                hidden_states = block(hidden_states, height, width)
            hidden_states = tokens_to_map(stage.layer_norm(hidden_states), (height, width))
            yield hidden_states


class Swin(MapFamily):
    """Swin: layer n is stage n before it is merged to half the size, as in transformers' SwinBackbone."""

    def layers(self, model, pixel_values):
        hidden_states, grid = model.embeddings(pixel_values, interpolate_pos_encoding=True)
        yield self.as_map(hidden_states, grid)
        for stage in model.encoder.layers:
            hidden_states, stage_map = self.run_stage(stage, hidden_states, grid)
            yield stage_map
            grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)

    def run_stage(self, stage: nn.Module, hidden_states: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The tokens handed to the next stage, and the stage's map."""
        window = stage.config.window_size
        for index, block in enumerate(stage.blocks):
            # an image smaller than a window shrinks it for good in transformers 5.13 .. 5.23: start each time anew
            block.window_size, block.shift_size = window, window // 2 * (index % 2)
        hidden_states, stage_map, _ = stage(hidden_states, grid, output_hidden_states_before_downsampling=True)
        return hidden_states, stage_map

    def as_map(self, hidden_states: Tensor, grid: tuple[int, int]) -> Tensor:
        return tokens_to_map(hidden_states, grid)

    def norm(self, model, hidden_states):
        return model.layernorm(hidden_states.movedim(1, -1)).movedim(-1, 1)


class Swinv2(Swin):
    """Swin v2: as Swin; its windows are fixed when it is built."""

    def run_stage(self, stage, hidden_states, grid):
        hidden_states, unmerged, _ = stage(hidden_states, grid)
        return hidden_states, self.as_map(unmerged, grid)


class Sam(MapFamily):
    """SAM: windowed blocks on a map with the channels last; the neck, which changes the width, is the last layer."""

    def model_classes(self, config):
        from transformers.models.sam.modeling_sam import SamVisionEncoder, SamVisionModel

        return (SamVisionModel, SamVisionEncoder)  # as an encoder of its own, and as a part of SamModel

    def layers(self, model, pixel_values):
        encoder = getattr(model, "vision_encoder", model)
        hidden_states = encoder.patch_embed.projection(pixel_values)
        if encoder.pos_embed is not None:
            hidden_states = hidden_states + self.positions(encoder.pos_embed, hidden_states.shape[-2:])
        yield hidden_states
        hidden_states = hidden_states.movedim(1, -1)
        for block in encoder.layers:
            hidden_states = block(hidden_states)
            yield hidden_states.movedim(-1, 1)
        yield encoder.neck(hidden_states)

    def positions(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """The native model takes one image size only; other sizes get resized positions, as in its own descendants."""
        table = table.movedim(-1, 1)  # (1, hidden, height, width)
        if table.shape[-2:] == grid:
            return table
        return F.interpolate(table.float(), size=grid, mode="bicubic", antialias=True).to(table.dtype)


class MobileNetV2(MapFamily):
    """MobileNetV2: layer 0 is the stem, layer n block n, and the last one the 1x1 convolution behind the blocks."""

    def layers(self, model, pixel_values):
        hidden_states = model.conv_stem(pixel_values)
        yield hidden_states
        for block in (*model.layer, model.conv_1x1):
            hidden_states = block(hidden_states)
            yield hidden_states


VISION_FAMILIES: dict[str, VisionFamily] = {
    "beit": Beit(),
    "clip_vision_model": Clip(),
    "convnext": ConvNext(),
    "convnextv2": ConvNext(),
    "deit": ResizedViT(),
    "dinov2": Dinov2(),
    "dinov2_with_registers": Dinov2(),
    "dinov3_convnext": Dinov3ConvNext(),
    "dinov3_vit": Dinov3(),
    "ijepa": PatchMean(),
    "internvl_vision": Dinov2(),
    "mobilenet_v2": MobileNetV2(),
    "radio": Radio(),
    "sam_vision_model": Sam(),
    "segformer": Segformer(),
    "siglip2_vision_model": Siglip2(),
    "siglip_vision_model": Siglip(),
    "specialized_vit": Specialized(),
    "swin": Swin(),
    "swinv2": Swinv2(),
    "vit": ResizedViT(),
    "vit_mae": Mae(),
    "vit_msn": ResizedViT(),
}

"""Models whose layers are maps: convolutional, windowed and hierarchical ones."""

from torch import Tensor, nn
from torch.nn import functional as F

from vitweave.modeling.tokens import tokens_to_map
from vitweave.modeling.vision_families.base import MapFamily, unchanged


class ConvNext(MapFamily):
    """ConvNeXt: layer n is stage n, layer 0 the stem; the final norm acts on the pooled output only."""

    blocks = "encoder.stages"

    def pool(self, model, hidden_states, normed):
        return model.layernorm(hidden_states.mean(dim=(-2, -1)))


class Dinov3ConvNext(MapFamily):
    """DINOv3 ConvNeXt: layer n is stage n, the stem is a part of stage 1; one norm for pooled mean and patches."""

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

    def layers(self, model, pixel_values, inject=unchanged):
        hidden_states = pixel_values
        yield hidden_states
        for layer, stage in enumerate(model.stages, start=1):
            hidden_states, height, width = stage.patch_embeddings(hidden_states)
            for block in stage.blocks:
                hidden_states = block(hidden_states, height, width)
            hidden_states = inject(layer, tokens_to_map(stage.layer_norm(hidden_states), (height, width)))
            yield hidden_states


class Swin(MapFamily):
    """Swin: layer n is stage n before it is merged to half the size, as in transformers' SwinBackbone."""

    takes_injections = False  # its stages merge what they hand on by themselves

    def layers(self, model, pixel_values, inject=unchanged):
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
            block.shift_size = 0 if min(grid) <= window else window // 2 * (index % 2)
        # Left to itself (transformers 5.13 .. 5.23) a block shrinks its window for good on an image smaller than that,
        # and then fails. always_partition keeps the window, and small images are padded to it, as in SwinBackbone.
        hidden_states, stage_map, _ = stage(
            hidden_states, grid, always_partition=True, output_hidden_states_before_downsampling=True
        )
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
    """SAM: windowed blocks on a map with the channels last; the halves of the neck, which changes the width, are the
    last two layers."""

    def model_classes(self, config):
        from transformers.models.sam.modeling_sam import SamVisionEncoder, SamVisionModel

        return (SamVisionModel, SamVisionEncoder)  # as an encoder of its own, and as a part of SamModel

    def layers(self, model, pixel_values, inject=unchanged):
        encoder = getattr(model, "vision_encoder", model)
        hidden_states = encoder.patch_embed.projection(pixel_values)
        if encoder.pos_embed is not None:
            hidden_states = hidden_states + self.positions(encoder.pos_embed, hidden_states.shape[-2:])
        yield hidden_states
        hidden_states = hidden_states.movedim(1, -1)
        depth, neck = len(encoder.layers), encoder.neck
        for layer, block in enumerate(encoder.layers, start=1):
            hidden_states = inject(layer, block(hidden_states).movedim(-1, 1))
            yield hidden_states
            hidden_states = hidden_states.movedim(1, -1)
        hidden_states = inject(depth + 1, neck.layer_norm1(neck.conv1(hidden_states.movedim(-1, 1))))
        yield hidden_states
        yield inject(depth + 2, neck.layer_norm2(neck.conv2(hidden_states)))

    def positions(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """The native model takes one image size only; other sizes get resized positions, as in its own descendants."""
        table = table.movedim(-1, 1)  # (1, hidden, height, width)
        if table.shape[-2:] == grid:
            return table
        return F.interpolate(table.float(), size=grid, mode="bicubic", antialias=True).to(table.dtype)


class MobileNetV2(MapFamily):
    """MobileNetV2: layer 0 is the stem, layer n block n, and the last one the 1x1 convolution behind the blocks."""

    def layers(self, model, pixel_values, inject=unchanged):
        hidden_states = model.conv_stem(pixel_values)
        yield hidden_states
        for layer, block in enumerate((*model.layer, model.conv_1x1), start=1):
            hidden_states = inject(layer, block(hidden_states))
            yield hidden_states

"""The EVA-02 detector ViT (arXiv:2303.11331): windowed and global blocks over patches, without a class token."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from vitweave.configuration.configuration_eva02_det import Eva02DetConfig
from vitweave.configuration.reductions import as_pair
from vitweave.modeling.eva02_det_layers import Eva02DetAttention, Eva02DetLayer, rotary_tables
from vitweave.modeling.grid_matching import resample_positions
from vitweave.modeling.pretrained import VitweavePreTrainedModel
from vitweave.modeling.tokens import tokens_to_map
from vitweave.modeling.vit_embeddings import check_pixel_values


@dataclass
class Eva02DetEncoderOutput(BaseModelOutput):
    """`kept`: the requested residual streams (batch, patches, hidden), in the order of the request."""

    kept: tuple[Tensor, ...] | None = None


class Eva02DetEmbeddings(nn.Module):
    """Image to patch tokens, with the position table resampled to the image's grid.

    The table keeps the row of the class token of pretraining, which the blocks never see, so that it holds what
    released checkpoints hold. That row gets a gradient of zero.
    """

    def __init__(self, config: Eva02DetConfig):
        super().__init__()
        self.num_channels, self.patch_size = config.num_channels, as_pair(config.patch_size)
        self.stored_grid, self.std = config.stored_grid, config.initializer_range
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, config.hidden_size, self.patch_size, stride=self.patch_size
        )
        positions = 1 + self.stored_grid[0] * self.stored_grid[1]
        self.position_embeddings = nn.Parameter(torch.empty(1, positions, config.hidden_size))
        self.set_start_values()

    @torch.no_grad()
    def set_start_values(self):
        init.trunc_normal_(self.position_embeddings, mean=0.0, std=self.std)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(batch, channels, height, width) -> tokens (batch, patches, hidden) and the patch grid (height, width)."""
        check_pixel_values(pixel_values, self.num_channels, self.patch_size)
        maps = self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype))
        grid = (maps.shape[2], maps.shape[3])
        table = self.position_embeddings[:, 1:]
        positions = resample_positions(table, grid, antialias=False, stored=self.stored_grid)
        return maps.flatten(2).transpose(1, 2) + positions, grid


class Eva02DetPreTrainedModel(VitweavePreTrainedModel):
    """Loading shared by the EVA-02 detector classes."""

    config_class = Eva02DetConfig
    base_model_prefix = "eva02_det"
    _no_split_modules = ["Eva02DetEmbeddings", "Eva02DetLayer"]
    _can_record_outputs = {"hidden_states": Eva02DetLayer, "attentions": Eva02DetAttention}
    _input_embed_layer = "patch_embeddings"


class Eva02DetEncoder(Eva02DetPreTrainedModel):
    """The blocks. Runs as deep as asked and keeps only the residual streams asked for."""

    def __init__(self, config: Eva02DetConfig):
        super().__init__(config)
        self.layer = nn.ModuleList(Eva02DetLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        hidden_states: Tensor,
        grid: tuple[int, int],
        keep: tuple[int, ...] = (),
        stop_at: int | None = None,
        **kwargs,
    ) -> Eva02DetEncoderOutput:
        """Run the blocks.

        Args:
            hidden_states: (batch, patches, hidden), the embeddings.
            grid: patches per column and row.
            keep: layers whose residual stream is returned in `kept`; 0 = embeddings, n = after block n.
            stop_at: number of blocks to run; None = all of them.
        """
        rotary = rotary_tables(self.config, grid, hidden_states)
        states = {0: hidden_states} if 0 in keep else {}
        for depth, layer in enumerate(self.layer[:stop_at], start=1):
            hidden_states = layer(hidden_states, grid=grid, rotary=rotary, **kwargs)
            if depth in keep:
                states[depth] = hidden_states
        return Eva02DetEncoderOutput(last_hidden_state=hidden_states, kept=tuple(states[depth] for depth in keep))


class Eva02DetModel(Eva02DetPreTrainedModel):
    """The encoder: patch tokens and their mean."""

    def __init__(self, config: Eva02DetConfig):
        super().__init__(config)
        self.embeddings = Eva02DetEmbeddings(config)
        self.encoder = Eva02DetEncoder(config)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Encode images (batch, channels, height, width) of any size of at least one patch.

        Returns:
            last_hidden_state (batch, patches, hidden), the residual stream, since there is no final norm; pooler_output
            (batch, hidden), the mean of the patches; on request hidden_states (embeddings and every block) and
            attentions, of global blocks (batch, heads, patches, patches), of windowed ones (batch * windows, heads,
            window_size ** 2, window_size ** 2).
        """
        hidden_states, grid = self.embeddings(pixel_values)
        outputs = self.encoder(hidden_states, grid, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=outputs.last_hidden_state.mean(dim=1),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class Eva02DetBackbone(BackboneMixin, Eva02DetPreTrainedModel):
    """Feature maps of the layers in `out_indices` (0 = "stem", the embeddings; n = "stage<n>", after block n).

    Runs no block beyond the deepest layer asked for, unless all hidden states are requested.
    """

    def __init__(self, config: Eva02DetConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.embeddings = Eva02DetEmbeddings(config)
        self.encoder = Eva02DetEncoder(config)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs) -> BackboneOutput:
        """Encode images (batch, channels, height, width).

        Returns:
            feature_maps, one (batch, hidden, height / patch, width / patch) per out index.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        wanted = tuple(self.stage_names.index(name) for name in self.out_features)
        stop_at = None if output_hidden_states else wanted[-1]
        hidden_states, grid = self.embeddings(pixel_values)
        outputs = self.encoder(
            hidden_states, grid, keep=wanted, stop_at=stop_at, output_hidden_states=output_hidden_states, **kwargs
        )
        return BackboneOutput(
            feature_maps=tuple(tokens_to_map(state, grid).contiguous() for state in outputs.kept),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

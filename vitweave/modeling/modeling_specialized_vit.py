"""Specialised ViT: [CLS] and patch tokens own separate norms and early QKV projections (arXiv:2602.08626)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.pretrained import VitweavePreTrainedModel
from vitweave.modeling.specialized_layers import (
    ClassAttentionLayer,
    SpecializedViTAttention,
    SpecializedViTLayer,
    add_bias,
)
from vitweave.modeling.tokens import by_role, tokens_to_map
from vitweave.modeling.vit_embeddings import RelativePositionBias, SpecializedViTEmbeddings, rotary_tables
from vitweave.modeling.vit_start_values import set_vit_start_values


@dataclass
class EncoderOutput(BaseModelOutput):
    """`kept`: the requested residual streams (batch, tokens, hidden), in the order of the request."""

    kept: tuple[Tensor, ...] | None = None


@dataclass
class SpecializedViTBackboneOutput(BackboneOutput):
    """`class_tokens`, on request: the first class token (batch, hidden) beside each map, normalised as the map is."""

    class_tokens: tuple[Tensor, ...] | None = None


class SpecializedViTPreTrainedModel(VitweavePreTrainedModel):
    """Initialisation and loading shared by the specialised ViT classes."""

    config_class = SpecializedViTConfig
    base_model_prefix = "specialized_vit"
    built_by = "from_vit"
    _keys_to_ignore_on_load_missing = ["mask_token"]  # starts at zero, may be added to any checkpoint
    _no_split_modules = ["SpecializedViTEmbeddings", "SpecializedViTLayer", "ClassAttentionLayer"]
    _can_record_outputs = {"hidden_states": SpecializedViTLayer, "attentions": SpecializedViTAttention}
    _input_embed_layer = "patch_embeddings"
    _keys_to_ignore_on_load_missing = [r"mask_token"]  # read in masked pretraining alone

    @classmethod
    def from_vit(cls, model_or_id: PreTrainedModel | str, **flags) -> "SpecializedViTPreTrainedModel":
        """Specialise a vanilla ViT (a model, a folder or a Hub id); its outputs stay the same.

        The flags are those of `vitweave.modeling.specialize.specialize`; `conversion_report` says what was copied.
        """
        from vitweave.modeling.specialize import specialize  # it imports this module

        return specialize(model_or_id, cls, **flags)

    def to_vanilla(self, strict: bool = True) -> PreTrainedModel:
        """The vanilla model this one was made from, with the patch weights; `strict` refuses to lose anything."""
        from vitweave.modeling.conversion.restore import to_vanilla  # heavy, and only needed here

        return to_vanilla(self, strict)

    def post_init(self):
        super().post_init()
        if self.config.attention_bias or self.config.relative_position_bias:
            # both hold something for every head, so that no process can do with some of the heads
            self._tp_plan = {name: style for name, style in self._tp_plan.items() if ".attention." not in name}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        set_vit_start_values(module, self.config)


class SpecializedViTEncoder(SpecializedViTPreTrainedModel):
    """The blocks. Runs as deep as asked and keeps only the residual streams asked for."""

    def __init__(self, config: SpecializedViTConfig):
        super().__init__(config)
        self.layer = nn.ModuleList(SpecializedViTLayer(config, index) for index in range(config.num_hidden_layers))
        self.class_layer = nn.ModuleList(ClassAttentionLayer(config) for _ in range(config.class_attention_layers))
        shared_bias = config.relative_position_bias == "shared"
        self.shared_relative_position_bias = RelativePositionBias(config) if shared_bias else None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        hidden_states: Tensor,
        grid: tuple[int, int],
        attention_mask: Tensor | None = None,
        keep: tuple[int, ...] = (),
        stop_at: int | None = None,
        inject: Callable[[int, Tensor], Tensor] | None = None,
        **kwargs,
    ) -> EncoderOutput:
        """Run the blocks.

        Args:
            hidden_states: (batch, tokens, hidden), the embeddings.
            grid: patches per column and row.
            attention_mask: (batch, tokens), 1 or True = visible.
            keep: layers whose residual stream is returned in `kept`; 0 = embeddings, n = after block n.
            stop_at: number of blocks to run; None = all of them, and the class-attention layers.
            inject: takes n and the residual stream after block n, and returns the one that goes on instead.
        """
        rotary, blocks_rotary = None, None
        if self.config.position_embedding_type == "rotary":
            blocks_rotary = rotary = rotary_tables(self.config, grid, hidden_states, self.training)
        mask = None
        if attention_mask is not None:
            mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        if self.shared_relative_position_bias is not None:
            mask = add_bias(mask, self.shared_relative_position_bias(grid).to(hidden_states.dtype))
        block_mask, skipped = mask, self.config.num_cls_tokens if self.class_layer else 0
        if skipped:  # the blocks see no class token
            block_mask = None if mask is None else mask[..., skipped:, skipped:]
            blocks_rotary = None if rotary is None else tuple(table[skipped:] for table in rotary)

        states = {0: hidden_states} if 0 in keep else {}
        for depth, layer in enumerate(self.layer[:stop_at], start=1):
            hidden_states = layer(hidden_states, block_mask, blocks_rotary, grid=grid, **kwargs)
            if inject is not None:
                hidden_states = inject(depth, hidden_states)
            if depth in keep:
                states[depth] = hidden_states
        for layer in self.class_layer if stop_at is None else ():
            hidden_states = layer(hidden_states, mask, **kwargs)
        return EncoderOutput(last_hidden_state=hidden_states, kept=tuple(states[depth] for depth in keep))


class SpecializedViTTrunk(SpecializedViTPreTrainedModel):
    """Embeddings, blocks and final norm: what the model and the backbone share."""

    def __init__(self, config: SpecializedViTConfig):
        super().__init__(config)
        self.embeddings = SpecializedViTEmbeddings(config)
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.pre_norm else None
        self.encoder = SpecializedViTEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.specialize_final_norm:
            self.layernorm_cls = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def embed(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        """Images to the input of block 0 and the patch grid."""
        hidden_states, grid = self.embeddings(pixel_values, bool_masked_pos)
        if self.pre_layernorm is not None:
            hidden_states = self.pre_layernorm(hidden_states)
        return hidden_states, grid


class SpecializedViTModel(SpecializedViTTrunk):
    """The encoder: token sequence and one pooled vector per image.

    A vanilla ViT becomes one by `SpecializedViTModel.from_vit(model_or_id, **flags)`, with unchanged outputs.
    """

    def __init__(self, config: SpecializedViTConfig):
        super().__init__(config)
        self.pooler = Pooler(config) if config.use_pooler else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: (batch, channels, height, width); any size of at least one patch.
            bool_masked_pos: (batch, patches), True where the mask token replaces the patch.
            attention_mask: (batch, tokens), 1 = visible, in the order [CLS.., registers.., patches..].

        Returns:
            last_hidden_state (batch, tokens, hidden) after the final norm (before it where `final_norm="pooled"`),
            pooler_output (batch, hidden), and on request hidden_states (embeddings and every block) and attentions.
        """
        hidden_states, grid = self.embed(pixel_values, bool_masked_pos)
        outputs = self.encoder(hidden_states, grid, attention_mask, **kwargs)
        tokens, pooled = self.pool(outputs.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=pooled,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def pool(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Final norm and pooling: (batch, tokens, hidden) -> the same and (batch, hidden)."""
        config = self.config
        if config.final_norm == "tokens":
            tokens = by_role(self, "layernorm", config.num_cls_rows, tokens)
        pooled = (
            tokens[:, :1] if config.pooling == "cls" else tokens[:, config.num_prefix_tokens :].mean(1, keepdim=True)
        )
        if config.final_norm == "pooled":
            pooled = by_role(self, "layernorm", int(config.pooling == "cls"), pooled)
        pooled = pooled[:, 0]
        return tokens, pooled if self.pooler is None else self.pooler(pooled)


class Pooler(nn.Module):
    """Dense layer and activation on the pooled vector (ViT, DeiT)."""

    def __init__(self, config: SpecializedViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_output_size or config.hidden_size)
        self.activation = ACT2FN[config.pooler_act]

    def forward(self, pooled: Tensor) -> Tensor:
        return self.activation(self.dense(pooled))


class SpecializedViTBackbone(BackboneMixin, SpecializedViTTrunk):
    """Feature maps of the layers in `out_indices` (0 = "stem", the embeddings; n = "stage<n>", after block n).

    Runs no block beyond the deepest layer asked for, unless all hidden states are requested.
    """

    def __init__(self, config: SpecializedViTConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        attention_mask: Tensor | None = None,
        output_class_tokens: bool = False,
        **kwargs,
    ) -> SpecializedViTBackboneOutput:
        """Encode images (batch, channels, height, width).

        Returns:
            feature_maps, one per out index: (batch, hidden, height / patch, width / patch), or with
            `reshape_hidden_states=False` (batch, tokens, hidden); after the final norm if `apply_layernorm`. With
            `output_class_tokens` also class_tokens, one (batch, hidden) per map.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        wanted = tuple(self.stage_names.index(name) for name in self.out_features)
        stop_at = None if output_hidden_states or wanted[-1] == self.config.num_hidden_layers else wanted[-1]
        hidden_states, grid = self.embed(pixel_values)
        outputs = self.encoder(
            hidden_states,
            grid,
            attention_mask,
            keep=wanted,
            stop_at=stop_at,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        return SpecializedViTBackboneOutput(
            feature_maps=tuple(self.to_map(state, grid) for state in outputs.kept),
            class_tokens=self.class_tokens(wanted, outputs) if output_class_tokens else None,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def to_map(self, state: Tensor, grid: tuple[int, int]) -> Tensor:
        """Norm and reshape one residual stream as the config asks."""
        if not self.config.reshape_hidden_states:
            return by_role(self, "layernorm", self.config.num_cls_rows, state) if self.config.apply_layernorm else state
        patches = state[:, self.config.num_prefix_tokens :]
        return tokens_to_map(self.layernorm(patches) if self.config.apply_layernorm else patches, grid).contiguous()

    def class_tokens(self, layers: tuple[int, ...], outputs: EncoderOutput) -> tuple[Tensor, ...]:
        """The first class token (batch, hidden) of each layer, after the final norm if `apply_layernorm`."""
        tokens = [state[:, :1] for state in outputs.kept]
        if self.encoder.class_layer and layers[-1] == self.config.num_hidden_layers:
            tokens[-1] = outputs.last_hidden_state[:, :1]  # the blocks leave it as it was, the class attention does not
        if self.config.apply_layernorm:
            tokens = [by_role(self, "layernorm", 1, token) for token in tokens]
        return tuple(token[:, 0] for token in tokens)


class SpecializedViTForImageClassification(SpecializedViTPreTrainedModel):
    """Linear classifier on the class token, the patch mean or both (`classifier_input`)."""

    accepts_loss_kwargs = True  # the loss below divides by num_items_in_batch

    def __init__(self, config: SpecializedViTConfig):
        super().__init__(config)
        self.loss_type = "ForImageClassification"
        self.specialized_vit = SpecializedViTModel(config)
        width = config.hidden_size
        if config.classifier_input == "pooled" and config.use_pooler:
            width = config.pooler_output_size or width
        if config.classifier_input == "cls_mean":
            width = 2 * width
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels else nn.Identity()
        if config.classifier_input == "cls_distilled":
            self.classifier_distilled = nn.Linear(width, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_outputs: dict[str, tuple[Tensor, ...]] | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """Classify images (batch, channels, height, width); labels (batch,) are class ids.

        Args:
            encoder_outputs: instead of pixel_values, what `encode` returned for them.

        Returns:
            logits (batch, num_labels), and the loss when labels are given.
        """
        if (pixel_values is None) == (encoder_outputs is None):
            raise ValueError(
                "expected either pixel_values or encoder_outputs (what `encode` returned for the images), got"
                f" {'neither' if pixel_values is None else 'both'}"
            )
        loss_options = {key: kwargs.pop(key) for key in ("num_items_in_batch",) if key in kwargs}
        if encoder_outputs is None:
            outputs = self.specialized_vit(pixel_values, attention_mask=attention_mask, **kwargs)
            inputs = self.classifier_inputs(outputs.last_hidden_state, outputs.pooler_output)
        else:
            outputs, inputs = BaseModelOutputWithPooling(), encoder_outputs["classifier_inputs"]
        logits = self.classifier(inputs[0])
        if self.config.classifier_input == "cls_distilled":
            logits = (logits + self.classifier_distilled(inputs[1])) / 2
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **loss_options)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def encode(self, pixel_values: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """What the classifier reads of the images, for `forward(encoder_outputs=...)`: the ViT need not run again."""
        outputs = self.specialized_vit(pixel_values)
        return {"classifier_inputs": self.classifier_inputs(outputs.last_hidden_state, outputs.pooler_output)}

    def classifier_inputs(self, tokens: Tensor, pooled: Tensor) -> tuple[Tensor, ...]:
        """(batch, width) for each classifier, of (batch, tokens, hidden) and (batch, hidden)."""
        kind = self.config.classifier_input
        if kind == "pooled":
            return (pooled,)
        if kind == "cls":
            return (tokens[:, 0],)
        if kind == "cls_distilled":
            return tokens[:, 0], tokens[:, 1]
        mean = tokens[:, self.config.num_prefix_tokens :].mean(dim=1)
        return (mean if kind == "mean" else torch.cat((tokens[:, 0], mean), dim=1),)

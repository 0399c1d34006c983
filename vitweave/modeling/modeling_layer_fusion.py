"""A vision encoder whose layers are fused: as a model, as a backbone, and under an image classifier."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig
from vitweave.modeling.encoded_images import EncodedImages, decode_layers, encode_features, read_layers
from vitweave.modeling.layer_fusion.base import FusedTokens, LayerTokens
from vitweave.modeling.layer_fusion.registry import LAYER_FUSIONS, build_layer_fusion
from vitweave.modeling.pretrained import VitweavePreTrainedModel, keep_weights
from vitweave.modeling.tokens import tokens_to_map
from vitweave.modeling.vision_encoder import VisionEncoder, VisionFeatures, find_vision_model


class LayerFusionPreTrainedModel(VitweavePreTrainedModel):
    """Loading and initialisation shared by the layer-fusion classes."""

    config: LayerFusionConfig
    config_class = LayerFusionConfig
    base_model_prefix = "layer_fusion"
    _no_split_modules = sorted(fusion.__name__ for fusion in LAYER_FUSIONS.values())

    @classmethod
    def from_encoder(cls, encoder: PreTrainedModel, **options) -> "LayerFusionPreTrainedModel":
        """Fuse the layers of a loaded vision model, whose weights are kept.

        Args:
            encoder: any vision model, or one with a vision part (CLIP).
            options: fields of `LayerFusionConfig`: `layers`, `fusion_type`, `fusion_options`, and of a classifier
                `num_labels` or `id2label`.
        """
        encoder = find_vision_model(encoder)
        implementation = encoder.config._attn_implementation
        config = LayerFusionConfig(encoder_config=encoder.config, attn_implementation=implementation, **options)
        keep_weights(encoder)
        model = cls(config, encoder)
        trunk = getattr(model, cls.base_model_prefix, model)
        for part in (trunk.fusion, *model.children()):
            if part is not trunk and not isinstance(part, VisionEncoder):
                part.to(device=encoder.device, dtype=encoder.dtype)
        return model


class LayerFusionTrunk(LayerFusionPreTrainedModel):
    """The encoder and the fusion of its layers, shared by the model and the backbone.

    An encoder without class token (SigLIP) gives the mean of the patches of each layer in its place. What the fusion
    improves is the encoder's pooled output, or, where that has another width, its class token after the final norm.

    Args:
        encoder: taken as it is, weights and all; None builds one from `config.encoder_config`.
    """

    def __init__(self, config: LayerFusionConfig, encoder: PreTrainedModel | None = None):
        super().__init__(config)
        shared = (config.fusion_options or {}).get("norm") == "shared"
        whole = VisionEncoder(config.encoder_config if encoder is None else encoder)
        layers = sorted({*config.layers, whole.num_layers})
        self.encoder = VisionEncoder(whole.model, layers=layers, final_norm=shared, keep_final=True)
        hidden_size = self.check_layers()
        self.fusion = build_layer_fusion(config.fusion_type, len(config.layers), hidden_size, config.fusion_options)
        image_size = getattr(self.encoder.config, "image_size", None)  # hybrid and timm encoders may not tell
        if image_size is not None:
            height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
            self.fusion.check_grid(self.encoder.grids_for(height, width)[-1])

    def check_layers(self) -> int:
        """The width that all fused layers share; layers of different width or grid are refused."""
        facts, layers = self.encoder.facts, self.config.layers
        sizes = {(facts.hidden_sizes[layer], facts.strides[layer]) for layer in (*layers, facts.num_layers)}
        if len(sizes) > 1:
            raise ValueError(
                f"expected layers of one width and one grid, got {sorted(sizes)} (channels, stride) for the layers"
                f" {list(layers)} and the last, {facts.num_layers}; of a hierarchical encoder choose layers of the last"
                " stage, or use the maps of its backbone"
            )
        return sizes.pop()[0]

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.model.set_input_embeddings(value)

    def fuse(
        self,
        pixel_values: Tensor,
        patch_mask: Tensor | None,
        output_attentions: bool | None,
        output_hidden_states: bool | int | list[int] | None,
    ) -> tuple[VisionFeatures, LayerTokens, FusedTokens]:
        """What the encoder returns for (batch, channels, height, width), what the fusion reads, what it returns.

        The features are of every layer if hidden states are asked for, and of those that are fused otherwise.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        features = self.encoder(pixel_values, all_layers=self.asks_for_states(output_hidden_states))
        tokens = self.layer_tokens(features, patch_mask)
        return features, tokens, self.fusion(tokens, bool(output_attentions))

    @property
    def vision_encoder(self) -> PreTrainedModel:
        """The encoder below the fusion."""
        return self.encoder.model

    @property
    def encode_options(self) -> dict:
        """What `encode` depends on besides the encoder; cached features are known by it."""
        return {
            "layers": tuple(self.config.layers),
            "final_norm": self.encoder.final_norm,
            "needs": tuple(sorted(self.fusion.needs)),
        }

    def encode(
        self, pixel_values: Tensor, patch_mask: Tensor | None = None, needs: Collection[str] | None = None
    ) -> EncodedImages:
        """What the fusion reads of the images, for `forward(encoder_outputs=...)`: the encoder need not run again.

        Args:
            needs: keep what a fusion with these `needs` reads, so that other fusions of the same layers can read it
                too; None is what this one reads.

        Returns:
            see `encode_features`.
        """
        features = self.encoder(pixel_values)
        needs = self.fusion.needs if needs is None else needs
        tokens = read_layers(features, self.config.layers, self.fusion.hidden_size, needs, patch_mask)
        return encode_features(features, tokens, patch_mask, base_patches="patches" in needs)

    def fuse_encoded(
        self, encoder_outputs: EncodedImages, output_attentions: bool | None = None
    ) -> tuple[LayerTokens, FusedTokens]:
        """What the fusion reads of features that `encode` returned, and what it returns."""
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        dtype = next(self.fusion.parameters()).dtype  # they may have been kept in half precision
        kept = {name: part.to(dtype) if part.is_floating_point() else part for name, part in encoder_outputs.items()}
        tokens = decode_layers(kept, self.fusion.needs)
        return tokens, self.fusion(tokens, bool(output_attentions))

    def asks_for_states(self, output_hidden_states: bool | int | list[int] | None) -> bool:
        """Whether the caller, or else the config, asks for hidden states of the encoder; 0 is a layer, not a no."""
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return asked is not None and asked is not False

    def states_asked_for(
        self, features: VisionFeatures, output_hidden_states: bool | int | list[int] | None
    ) -> tuple[Tensor | None, ...] | None:
        """The encoder's hidden states, None at those not asked for by index (a whole number, or several)."""
        if not self.asks_for_states(output_hidden_states):
            return None
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if asked is True:
            return features.states
        wanted = {index % len(features.states) for index in ([asked] if isinstance(asked, int) else asked)}
        return tuple(state if index in wanted else None for index, state in enumerate(features.states))

    def layer_tokens(self, features: VisionFeatures, patch_mask: Tensor | None = None) -> LayerTokens:
        """What the fusion reads of the encoder's features."""
        return read_layers(features, self.config.layers, self.fusion.hidden_size, self.fusion.needs, patch_mask)


class LayerFusionModel(LayerFusionTrunk):
    """The encoder with its layers fused; at the start its outputs are the encoder's own, bit for bit."""

    def __init__(self, config: LayerFusionConfig, encoder: PreTrainedModel | None = None):
        super().__init__(config, encoder)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        patch_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        encoder_outputs: EncodedImages | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: (batch, channels, height, width).
            patch_mask: (batch, patches), True where a patch shows the image, not padding; read by the fusion.
            output_attentions: return what the fusion attended to, where it attends.
            encoder_outputs: instead of pixel_values and patch_mask, what `encode` returned for them. Without patches in
                it, last_hidden_state holds the class tokens and registers only, and there are no hidden_states.

        Returns:
            pooler_output (batch, hidden), fused; last_hidden_state (batch, tokens, hidden), the encoder's own with
            fused patches where the fusion is dense; attentions of the fusion; on request hidden_states of the encoder.
        """
        if encoder_outputs is None:
            features, tokens, fused = self.fuse(pixel_values, patch_mask, output_attentions, output_hidden_states)
            prefix, states = features.final[:2], self.states_asked_for(features, output_hidden_states)
        else:
            tokens, fused = self.fuse_encoded(encoder_outputs, output_attentions)
            prefix, states = [encoder_outputs["prefix"]], None
        patches = tokens.base_patches if fused.patches is None else fused.patches
        return BaseModelOutputWithPooling(
            last_hidden_state=torch.cat([*prefix, *([] if patches is None else [patches])], dim=1),
            pooler_output=fused.pooled,
            hidden_states=states,
            attentions=None if fused.attentions is None else (fused.attentions,),
        )


class LayerFusionBackbone(BackboneMixin, LayerFusionTrunk):
    """The maps of a fusion that fuses patches: its pyramid, fine to coarse, or its patches as one map."""

    def __init__(self, config: LayerFusionConfig, encoder: PreTrainedModel | None = None):
        super().__init__(config, encoder)
        channels = self.fusion.map_channels
        if not channels:
            raise ValueError(
                f"the layer fusion {config.fusion_type!r} with the options {config.fusion_options} fuses no patches, so"
                " it has no maps for a backbone; use one that does (dense=True where it is an option, 'film', 'fpn')"
            )
        self.stage_names = config.stage_names = [f"map{index + 1}" for index in range(len(channels))]
        self.num_features = list(channels)
        nothing_chosen = config.out_features is None and config.out_indices is None
        config.set_output_features_output_indices(
            self.stage_names if nothing_chosen else config.out_features, config.out_indices
        )
        self.post_init()

    def post_init(self):
        LayerFusionTrunk.post_init(self)  # BackboneMixin's would put hooks into the encoder, which cannot be compiled

    def _init_transformers_backbone(self) -> None:
        """Called before there is a fusion, which alone knows its maps."""

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        patch_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        encoder_outputs: EncodedImages | None = None,
        **kwargs,
    ) -> BackboneOutput:
        """Encode images (batch, channels, height, width), or fuse what `encode` returned for them.

        Returns:
            feature_maps, one per out index: (batch, channels, height_k, width_k); attentions of the fusion; on
            request hidden_states of the encoder.
        """
        if encoder_outputs is None:
            features, tokens, fused = self.fuse(pixel_values, patch_mask, output_attentions, output_hidden_states)
            states = self.states_asked_for(features, output_hidden_states)
        else:
            (tokens, fused), states = self.fuse_encoded(encoder_outputs, output_attentions), None
        maps = fused.feature_maps or (tokens_to_map(fused.patches, tokens.grid).contiguous(),)
        return BackboneOutput(
            feature_maps=tuple(maps[self.stage_names.index(name)] for name in self.out_features),
            hidden_states=states,
            attentions=None if fused.attentions is None else (fused.attentions,),
        )


class LayerFusionForImageClassification(LayerFusionPreTrainedModel):
    """Linear classifier on the fused embedding.

    Args:
        encoder: see `LayerFusionTrunk`.
    """

    accepts_loss_kwargs = True  # the loss below divides by num_items_in_batch

    def __init__(self, config: LayerFusionConfig, encoder: PreTrainedModel | None = None):
        super().__init__(config)
        self.loss_type = "ForImageClassification"
        self.layer_fusion = LayerFusionModel(config, encoder)
        hidden_size = self.layer_fusion.fusion.hidden_size
        self.classifier = nn.Linear(hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @property
    def vision_encoder(self) -> PreTrainedModel:
        """The encoder below the fusion."""
        return self.layer_fusion.vision_encoder

    @property
    def encode_options(self) -> dict:
        """What `encode` depends on besides the encoder."""
        return self.layer_fusion.encode_options

    def encode(self, pixel_values: Tensor, patch_mask: Tensor | None = None) -> EncodedImages:
        """What the fusion reads of the images, for `forward(encoder_outputs=...)`."""
        return self.layer_fusion.encode(pixel_values, patch_mask)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        patch_mask: Tensor | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """Classify images (batch, channels, height, width); labels (batch,) are class ids, kwargs those of the model.

        Returns:
            logits (batch, num_labels), and the loss when labels are given.
        """
        loss_options = {key: kwargs.pop(key) for key in ("num_items_in_batch",) if key in kwargs}
        outputs = self.layer_fusion(pixel_values, patch_mask=patch_mask, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **loss_options)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

"""Several vision encoders fused into one: as a model, as a backbone, and under an image classifier."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.encoder_options import EncoderOptions, size_for
from vitweave.configuration.reductions import as_pair
from vitweave.modeling.encoder_fusion.base import EncoderMaps
from vitweave.modeling.encoder_fusion.registry import ENCODER_FUSIONS, build_encoder_fusion
from vitweave.modeling.grid_matching import (
    bicubic_antialias,
    bilinear,
    bilinear_ac,
    pixel_unshuffle_a,
    pixel_unshuffle_b,
)
from vitweave.modeling.image_views import views_of
from vitweave.modeling.pretrained import VitweavePreTrainedModel, keep_weights
from vitweave.modeling.tokens import tokens_to_map
from vitweave.modeling.vision_encoder import VisionEncoder, find_vision_model
from vitweave.modeling.vit_embeddings import check_pixel_values

EncodedByAll = dict[str, tuple[Tensor, ...]]
UNSHUFFLE = {"a": pixel_unshuffle_a, "b": pixel_unshuffle_b}
RESIZE = {"bilinear": bilinear, "bilinear_ac": bilinear_ac, "bicubic_antialias": bicubic_antialias}


class MultiEncoderPreTrainedModel(VitweavePreTrainedModel):
    """Building from encoders and freezing them, shared by the multi-encoder classes."""

    config: MultiEncoderConfig
    config_class = MultiEncoderConfig
    base_model_prefix = "multi_encoder"
    # one that injects also runs between the blocks of an encoder
    _no_split_modules = sorted(fusion.__name__ for fusion in ENCODER_FUSIONS.values() if not fusion.injects)

    @classmethod
    def from_encoders(cls, encoders: Sequence[PreTrainedModel], **options) -> "MultiEncoderPreTrainedModel":
        """Join loaded vision models, whose weights are kept.

        Args:
            encoders: any vision models, or ones with a vision part (CLIP).
            options: fields of `MultiEncoderConfig`: `encoder_options`, `image_size`, `fusion_type`, `fusion_options`,
                and of a classifier `num_labels` or `id2label`.
        """
        encoders = [find_vision_model(encoder) for encoder in encoders]
        implementations = {
            f"encoder_{index}": encoder.config._attn_implementation for index, encoder in enumerate(encoders)
        }
        config = MultiEncoderConfig(
            encoder_configs=[encoder.config for encoder in encoders], attn_implementation=implementations, **options
        )
        keep_weights(*encoders)
        model = cls(config, encoders)
        trunk = getattr(model, cls.base_model_prefix, model)
        for part in (trunk.fusion, *model.children()):
            if part is not trunk and not isinstance(part, VisionEncoder):
                part.to(device=encoders[0].device, dtype=encoders[0].dtype)
        return model

    def frozen_parts(self) -> list[nn.Module]:
        """The encoders that the config says to keep as they are."""
        trunk = getattr(self, self.base_model_prefix, self)
        pairs = zip(trunk.encoders, self.config.options, strict=True)
        return [encoder for encoder, options in pairs if options.frozen]


class MultiEncoderTrunk(MultiEncoderPreTrainedModel):
    """The encoders and their fusion, shared by the model and the backbone.

    The tower gets one `pixel_values`; every encoder sees it at its own size and normalisation. Images of another size
    than the configured one reach every encoder at the same proportion of its own.

    Args:
        encoders: taken as they are, weights and all; None builds them from `config.encoder_configs`.
    """

    def __init__(self, config: MultiEncoderConfig, encoders: Sequence[PreTrainedModel] | None = None):
        super().__init__(config)
        self.options = config.options  # read once: making them anew in every forward could not be compiled
        for index, (member, options) in enumerate(zip(encoders or config.encoder_configs, self.options, strict=True)):
            self.add_module(f"encoder_{index}", self.build_encoder(member, options))
        self.fusion = build_encoder_fusion(
            config.fusion_type, config.in_channels, config.grids, config.hidden_size, config.fusion_options
        )
        self.hand_down_attention()
        self.check_encoders()

    def build_encoder(self, member: PreTrainedModel | PreTrainedConfig, options: EncoderOptions) -> VisionEncoder:
        """One encoder, from its config or around a loaded model."""
        before = "drop_before" if options.class_token == "drop_before" else "keep"
        return VisionEncoder(member, layers=options.layers, final_norm=options.final_norm, class_token=before)

    @property
    def encoders(self) -> list[VisionEncoder]:
        """All encoders in the order of the config."""
        return [getattr(self, f"encoder_{index}") for index in range(len(self.config.encoder_configs))]

    def hand_down_attention(self):
        """Tell models of transformers inside the fusion which attention to use; they are no sub-configs."""
        implementation = self.config._attn_implementation
        for part in self.fusion.modules():
            if isinstance(part, PreTrainedModel) and implementation in ("eager", "sdpa"):
                part.set_attn_implementation(implementation)

    def check_encoders(self):
        """Refuse encoders whose features are not what their options say, and class tokens that nobody reads."""
        for index, (encoder, options) in enumerate(zip(self.encoders, self.config.options, strict=True)):
            channels, stride = sum(encoder.hidden_sizes), encoder.strides[0]
            if options.channels is not None and (options.channels, as_pair(options.stride)) != (channels, stride):
                raise ValueError(
                    f"encoder_options[{index}] says channels={options.channels} and stride={options.stride}, but the"
                    f" layers {encoder.layers} of the {encoder.config.model_type!r} encoder have {channels} channels"
                    f" and a stride of {stride}"
                )
            if options.class_token == "keep" and not self.fusion.takes_prefixes:
                raise ValueError(
                    f"encoder_options[{index}] keeps the class token, but the fusion {self.config.fusion_type!r} reads"
                    ' maps only; use class_token="drop_after"'
                )

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder_0.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder_0.model.set_input_embeddings(value)

    # Encoding --------------------------------------------------------------------------------------------------------

    @property
    def vision_encoder(self) -> nn.Module:
        """All encoders below the fusion as one module: what must be frozen for its features to be kept."""
        return nn.ModuleList(encoder.model for encoder in self.encoders)

    @property
    def encode_options(self) -> dict:
        """What `encode` depends on besides the encoders; cached features are known by it."""
        config = self.config
        return {
            "encoders": tuple(str(sorted(vars(options).items())) for options in config.options),
            "tower": str((config.image_size, config.image_mean, config.image_std)),
            "views": (self.fusion.crops, self.fusion.has_global_view) if self.fusion.takes_views else None,
        }

    def encode(self, pixel_values: Tensor) -> EncodedByAll:
        """What the fusion reads of the images, for `forward(encoder_outputs=...)`: the encoders need not run again.

        Returns:
            "maps": (batch, channels_k, height_k, width_k) per encoder; "prefixes", where class tokens are kept:
            (batch, tokens, channels_k) per encoder, without tokens where it drops them.
        """
        if self.fusion.injects and self.fusion.adapters:
            raise ValueError(
                f"the fusion {self.config.fusion_type!r} acts between the blocks of encoder 0, so that its features"
                " change as the adapters train; only without them (adapter_layers=[]) can they be kept"
            )
        features = self.read(pixel_values)
        return {"maps": tuple(features.maps)} | ({"prefixes": tuple(features.prefixes)} if features.prefixes else {})

    def read(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> EncoderMaps:
        """What the fusion reads of images (batch, channels, height, width)."""
        check_pixel_values(pixel_values, self.config.num_channels, None)
        count = len(self.encoders)
        maps, prefixes = [None] * count, [None] * count
        for index in reversed(range(count)):  # an injecting fusion needs the others before the first
            after = self.fusion.injections(maps[1]) if self.fusion.injects and index == 0 else None
            maps[index], prefixes[index] = self.run_encoder(index, pixel_values, after)
        kept = any(options.class_token == "keep" for options in self.options)
        return EncoderMaps(maps, prefixes if kept else [], image_sizes)

    def run_encoder(self, index: int, pixel_values: Tensor, after: dict | None) -> tuple[Tensor, Tensor]:
        """Map and kept class tokens of one encoder, on the device of the images."""
        encoder, options = self.encoders[index], self.options[index]
        views = None
        if index == 0 and self.fusion.takes_views and (self.fusion.crops > 1 or self.fusion.has_global_view):
            side = size_for(options, as_pair(self.config.image_size), tuple(pixel_values.shape[-2:]))
            images = views_of(pixel_values, side, self.fusion.crops, self.fusion.has_global_view)
            views, images = images.shape[1], images.flatten(0, 1)
        else:
            images = self.resized(pixel_values, options)
        features = encoder(self.renormalised(images, options), after=after)
        found = features.feature_maps
        grid = found[0].shape[-2:]
        maps = torch.cat([found[0], *(bilinear(part, grid) for part in found[1:])], dim=1).to(pixel_values.device)
        if options.unshuffle is not None:
            maps = UNSHUFFLE[options.unshuffle["order"]](maps, options.factor)
        prefix = torch.cat([features.class_tokens[0], features.registers[0]], dim=1)
        if options.class_token != "keep":
            prefix = prefix[:, :0]
        if views is not None:
            maps = maps.unflatten(0, (-1, views))
        return maps, prefix.to(pixel_values.device)

    def resized(self, pixel_values: Tensor, options: EncoderOptions) -> Tensor:
        """The images at the size this encoder sees."""
        if options.image_size is None:
            return pixel_values
        size = size_for(options, as_pair(self.config.image_size), tuple(pixel_values.shape[-2:]))
        return RESIZE[options.resize](pixel_values, size)

    def renormalised(self, pixel_values: Tensor, options: EncoderOptions) -> Tensor:
        """The pixels as this encoder wants them."""
        if options.image_mean is None:
            return pixel_values
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float32, device=pixel_values.device).view(-1, 1, 1)
            for values in (self.config.image_mean, self.config.image_std, options.image_mean, options.image_std)
        )
        return ((pixel_values * std + mean - own_mean) / own_std).to(pixel_values.dtype)

    def fuse(
        self, pixel_values: Tensor | None, image_sizes: Tensor | None, encoder_outputs: EncodedByAll | None
    ) -> tuple[Tensor, tuple[int, int] | None]:
        """Tokens (batch, tokens, hidden) of images, or of what was kept of them, and their grid."""
        if (pixel_values is None) == (encoder_outputs is None):
            raise ValueError(
                "expected either pixel_values or encoder_outputs (what `encode` returned for the images), got"
                f" {'neither' if pixel_values is None else 'both'}"
            )
        if encoder_outputs is None:
            features = self.read(pixel_values, image_sizes)
        else:
            features = self.kept(encoder_outputs, image_sizes)
        grids = [(part.shape[-2], part.shape[-1]) for part in features.maps]
        return self.fusion(features), self.fusion.plan_for(grids).grid

    def kept(self, encoder_outputs: EncodedByAll, image_sizes: Tensor | None) -> EncoderMaps:
        """Features that `encode` returned, in the type the fusion computes in: they may be kept in half precision."""
        channels = [part.shape[-3] for part in encoder_outputs["maps"]]
        if channels != self.config.in_channels:
            raise ValueError(
                f"expected encoder_outputs of {len(self.encoders)} encoders with {self.config.in_channels} channels,"
                f" got {channels}; they were made by another tower"
            )
        dtype = next((parameter.dtype for parameter in self.fusion.parameters()), self.dtype)
        maps, prefixes = ([part.to(dtype) for part in encoder_outputs.get(name, ())] for name in ("maps", "prefixes"))
        return EncoderMaps(maps, prefixes, image_sizes)


class MultiEncoderModel(MultiEncoderTrunk):
    """The encoders with their features fused into one token sequence."""

    def __init__(self, config: MultiEncoderConfig, encoders: Sequence[PreTrainedModel] | None = None):
        super().__init__(config, encoders)
        self.post_init()
        self.freeze()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        encoder_outputs: EncodedByAll | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: (batch, channels, height, width).
            image_sizes: (batch, 2), int64, (height, width) of images before they were padded to a square; read by
                fusions that mask the padding.
            encoder_outputs: instead of pixel_values, what `encode` returned for them.
            output_hidden_states: True, or indices as transformers' vision-language models ask for them; there is one
                hidden state, the fused tokens, which is the last: they use `vision_feature_layer=-1`.

        Returns:
            last_hidden_state (batch, tokens, hidden), fused; pooler_output (batch, hidden), their mean.
        """
        tokens, _ = self.fuse(pixel_values, image_sizes, encoder_outputs)
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=tokens.mean(dim=1),
            hidden_states=None if asked is False else (tokens,),  # layer 0 is asked for as the number 0
        )


class MultiEncoderBackbone(BackboneMixin, MultiEncoderTrunk):
    """The fused tokens as a map, for fusions that keep a grid."""

    def __init__(self, config: MultiEncoderConfig, encoders: Sequence[PreTrainedModel] | None = None):
        super().__init__(config, encoders)
        if not self.fusion.keeps_grid:
            raise ValueError(
                f"the fusion {config.fusion_type!r} with the options {config.fusion_options} returns a sequence, so it"
                " has no map for a backbone; use one that keeps a grid, e.g. 'channel_concat'"
            )
        self.stage_names, self.num_features = config.stage_names, [self.fusion.hidden_size]
        self.post_init()
        self.freeze()

    def post_init(self):
        MultiEncoderTrunk.post_init(self)  # BackboneMixin's would put hooks into the encoders, which cannot be compiled

    def _init_transformers_backbone(self) -> None:
        """Called before there is a fusion, which knows the map's channels."""

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        encoder_outputs: EncodedByAll | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BackboneOutput:
        """Encode images, as `MultiEncoderModel` does.

        Returns:
            feature_maps: one (batch, channels, height, width); hidden_states, if asked for: the same one.
        """
        tokens, grid = self.fuse(pixel_values, image_sizes, encoder_outputs)
        maps = (tokens_to_map(tokens, grid).contiguous(),)
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BackboneOutput(feature_maps=maps, hidden_states=maps if asked else None)


class MultiEncoderForImageClassification(MultiEncoderPreTrainedModel):
    """Linear classifier on the mean of the fused tokens after a LayerNorm."""

    accepts_loss_kwargs = True  # the loss below divides by num_items_in_batch

    def __init__(self, config: MultiEncoderConfig, encoders: Sequence[PreTrainedModel] | None = None):
        super().__init__(config)
        self.loss_type = "ForImageClassification"
        self.multi_encoder = MultiEncoderModel(config, encoders)
        hidden_size = self.multi_encoder.fusion.hidden_size
        self.norm = nn.LayerNorm(hidden_size)
        self.classifier = nn.Linear(hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()
        self.freeze()

    @property
    def vision_encoder(self) -> nn.Module:
        """All encoders below the fusion."""
        return self.multi_encoder.vision_encoder

    @property
    def encode_options(self) -> dict:
        """What `encode` depends on besides the encoders."""
        return self.multi_encoder.encode_options

    def encode(self, pixel_values: Tensor) -> EncodedByAll:
        """What the fusion reads of the images, for `forward(encoder_outputs=...)`."""
        return self.multi_encoder.encode(pixel_values)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        image_sizes: Tensor | None = None,
        encoder_outputs: EncodedByAll | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """Classify images (batch, channels, height, width), or what `encode` returned for them.

        Returns:
            logits (batch, num_labels), and the loss when labels (batch,) of class ids are given.
        """
        loss_options = {key: kwargs.pop(key) for key in ("num_items_in_batch",) if key in kwargs}
        pooled = self.multi_encoder(pixel_values, image_sizes, encoder_outputs).pooler_output
        logits = self.classifier(self.norm(pooled))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **loss_options)
        return ImageClassifierOutput(loss=loss, logits=logits)

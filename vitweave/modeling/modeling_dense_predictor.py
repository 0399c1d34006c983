"""Predictions per pixel: any registered backbone under a head."""

from collections.abc import Sequence
from dataclasses import fields

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BackboneOutput, SemanticSegmenterOutput
from transformers.utils.generic import can_return_tuple

from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.reductions import as_pair
from vitweave.modeling.class_tokens import as_asked, class_token_request, class_tokens_of
from vitweave.modeling.heads.registry import DEPTH_HEADS, SEGMENTATION_HEADS, build_segmentation_head
from vitweave.modeling.losses import SegmentationLoss
from vitweave.modeling.own_models import build_backbone
from vitweave.modeling.pretrained import VitweavePreTrainedModel, keep_weights
from vitweave.modeling.vit_embeddings import check_pixel_values

EncoderOutputs = dict[str, tuple[Tensor, ...]]


class DensePredictorPreTrainedModel(VitweavePreTrainedModel):
    """The part under the head: the backbone, its maps, and whether it is frozen.

    A backbone that fuses (layers of an encoder, or several encoders) has a `vision_encoder`: frozen is that alone, and
    the fusion trains with the head.

    Args:
        backbone: taken as it is, weights and all; None builds one from `config.backbone_config`.
    """

    config: DensePredictorConfig
    base_model_prefix = "backbone"
    _no_split_modules = sorted(head.__name__ for head in (*SEGMENTATION_HEADS.values(), *DEPTH_HEADS.values()))

    def __init__(self, config: DensePredictorConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        if getattr(config.backbone_config, "reshape_hidden_states", True) is False:
            raise ValueError(
                "expected a backbone that returns maps, got reshape_hidden_states=False in its config; set it to True"
            )
        self.backbone = build_backbone(config.backbone_config) if backbone is None else backbone
        self.freeze()

    @classmethod
    def from_backbone(
        cls,
        backbone: PreTrainedModel,
        num_labels: int | None = None,
        id2label: dict[int, str] | None = None,
        head_type: str = "linear",
        freeze_backbone: bool = False,
        **options,
    ) -> "DensePredictorPreTrainedModel":
        """Put a new head on a loaded backbone, whose weights are kept.

        Args:
            backbone: a `...Backbone`, e.g. from `AutoBackbone.from_pretrained(folder, out_indices=[3, 6, 9, 12])`.
            options: other fields of `DensePredictorConfig` (`losses`, `class_weights`, ...), and options of the head.
        """
        if not hasattr(backbone, "channels"):
            raise ValueError(
                f"expected a backbone, which returns feature maps, got {type(backbone).__name__};"
                " load it with AutoBackbone.from_pretrained(...)"
            )
        if num_labels is not None and id2label is not None and num_labels != len(id2label):
            raise ValueError(f"num_labels={num_labels}, but id2label names {len(id2label)} labels; give one of them")
        labels = {"num_labels": num_labels} if id2label is None else {"id2label": id2label}
        config_fields = {field.name for field in fields(DensePredictorConfig)}
        head_options = {name: value for name, value in options.items() if name not in config_fields}
        config = DensePredictorConfig(
            backbone_config=backbone.config,
            head_type=head_type,
            head_options={**(options.pop("head_options", None) or {}), **head_options},
            freeze_backbone=freeze_backbone,
            attn_implementation=backbone.config._attn_implementation,
            **{name: value for name, value in labels.items() if value is not None},
            **{name: value for name, value in options.items() if name in config_fields},
        )
        keep_weights(backbone)
        model = cls(config, backbone)
        for part in (model.head, model.criterion):
            part.to(device=backbone.device, dtype=backbone.dtype)
        return model

    def frozen_parts(self) -> list[nn.Module]:
        return [self.vision_encoder] if self.config.freeze_backbone else []

    def freeze_backbone(self) -> None:
        """Keep the encoder as it is, from now on and after loading."""
        self.config.freeze_backbone = True
        self.freeze()

    @property
    def vision_encoder(self) -> nn.Module:
        """The backbone, or what lies below its fusion."""
        return getattr(self.backbone, "vision_encoder", self.backbone)

    @property
    def fuses(self) -> bool:
        """Whether the backbone fuses what its own `encode` returns."""
        return hasattr(self.backbone, "encode")

    @property
    def reads_class_tokens(self) -> bool:
        """Whether the head reads the class token beside every map."""
        return getattr(self.head, "reads_class_tokens", False)

    @property
    def encode_options(self) -> dict[str, bool]:
        """What `encode` depends on besides the backbone; cached features are known by it."""
        return {"class_tokens": self.reads_class_tokens} | (self.backbone.encode_options if self.fuses else {})

    def encode(self, pixel_values: Tensor) -> EncoderOutputs:
        """What is read of the encoder, for `forward(encoder_outputs=...)`: it need not run again.

        Returns:
            "feature_maps": (batch, channels_k, height_k, width_k) per layer; "class_tokens", only where the head reads
            them: (batch, channels_k) per layer. Of a backbone that fuses, what its own `encode` returns.
        """
        return self.backbone.encode(pixel_values) if self.fuses else self.run_backbone(pixel_values)[0]

    def read(
        self, pixel_values: Tensor | None, encoder_outputs: EncoderOutputs | None, **kwargs
    ) -> tuple[EncoderOutputs, BackboneOutput]:
        """What the head reads, from the images or as it was kept, and what else the backbone returned."""
        if (pixel_values is None) == (encoder_outputs is None):
            raise ValueError(
                "expected either pixel_values or encoder_outputs (what `encode` returned for the images), got"
                f" {'neither' if pixel_values is None else 'both'}"
            )
        if encoder_outputs is None:
            return self.run_backbone(pixel_values, **kwargs)
        if self.fuses:
            return {"feature_maps": self.backbone(encoder_outputs=encoder_outputs).feature_maps}, BackboneOutput()
        check_encoder_outputs(encoder_outputs, self.backbone.channels, self.reads_class_tokens)
        dtype = next(self.head.parameters()).dtype  # they may have been kept in half precision
        kept = {name: tuple(part.to(dtype) for part in parts) for name, parts in encoder_outputs.items()}
        return kept, BackboneOutput()

    def run_backbone(self, pixel_values: Tensor, **kwargs) -> tuple[EncoderOutputs, BackboneOutput]:
        """What the head reads of the images (see `encode`), and all that the backbone returned."""
        patch_size = getattr(self.config.backbone_config, "patch_size", None)
        if not getattr(self.backbone, "reads_modalities", False):
            check_pixel_values(
                pixel_values,
                getattr(self.config.backbone_config, "num_channels", None),
                None if patch_size is None else as_pair(patch_size),
            )
        request = class_token_request(self.backbone) if self.reads_class_tokens else {}
        outputs = self.backbone.forward_with_filtered_kwargs(pixel_values, **kwargs | request)
        for feature_map in outputs.feature_maps:
            if feature_map.ndim != 4:
                raise ValueError(
                    f"expected maps (batch, channels, height, width), got {tuple(feature_map.shape)} from"
                    f" {type(self.backbone).__name__}; set reshape_hidden_states=True in its config if it has it"
                )
        read = {"feature_maps": tuple(outputs.feature_maps)}
        if self.reads_class_tokens:
            read["class_tokens"] = class_tokens_of(self.backbone, outputs)
        if "output_hidden_states" in request:
            asked = kwargs.get("output_hidden_states", self.backbone.config.output_hidden_states)
            outputs.hidden_states = as_asked(outputs.hidden_states, asked)
        return read, outputs


def check_encoder_outputs(encoder_outputs: EncoderOutputs, channels: Sequence[int], reads_class_tokens: bool):
    """Refuse features of another encoder, of other layers, or without the class tokens that the head reads."""
    needed = ["feature_maps", "class_tokens"] if reads_class_tokens else ["feature_maps"]
    for name in needed:
        if name not in encoder_outputs:
            raise ValueError(
                f"expected {needed} in encoder_outputs, got {sorted(encoder_outputs)}; they are what `encode` of this"
                " model returns"
            )
        found = [part.shape[1] for part in encoder_outputs[name]]
        if found != list(channels):
            raise ValueError(
                f"expected {name} of {list(channels)} channels in encoder_outputs, got {found}; encode the images with"
                " this model's own backbone"
            )


class DensePredictorForSemanticSegmentation(DensePredictorPreTrainedModel):
    """Semantic segmentation: one score per class and pixel of the input.

    The head reads the maps of `backbone.out_features`; its logits are upsampled bilinearly to the input's size, where
    the losses compare them with the labels.
    """

    def __init__(self, config: DensePredictorConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config, backbone)
        self.head = build_segmentation_head(
            config.head_type, list(self.backbone.channels), config.num_labels, config.head_options
        )
        losses = {"cross_entropy": 1.0} if config.losses is None else config.losses
        self.criterion = SegmentationLoss(
            config.num_labels, losses, config.loss_options, config.class_weights, config.ignore_index
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: EncoderOutputs | None = None,
        **kwargs,
    ) -> SemanticSegmenterOutput:
        """Score every pixel.

        Args:
            pixel_values: (batch, channels, height, width).
            labels: (batch, height, width) class ids, `config.ignore_index` where no class is known.
            encoder_outputs: instead of pixel_values, what `encode` returned for them. The logits take the size of the
                labels then, and without labels the head's own.
            kwargs: go to the backbone, e.g. `output_hidden_states`.

        Returns:
            logits (batch, num_labels, height, width) and, with labels, the loss.
        """
        read, outputs = self.read(pixel_values, encoder_outputs, **kwargs)
        logits = self.head(list(read["feature_maps"]))
        shown = labels if pixel_values is None else pixel_values
        if shown is not None:
            logits = F.interpolate(logits, size=shown.shape[-2:], mode="bilinear", align_corners=False)
        loss = None if labels is None else self.criterion(logits, labels)
        return SemanticSegmenterOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

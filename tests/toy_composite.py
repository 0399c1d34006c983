"""A composite of four tiny native encoders, each saved under other tensor names than it has in memory."""

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    Dinov2Config,
    PreTrainedConfig,
    SegformerConfig,
    SwinConfig,
    ViTConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from vitweave.configuration.configuration_base import VitweaveConfig
from vitweave.modeling.pretrained import VitweavePreTrainedModel

ENCODERS = ("vit", "dinov2", "swin", "segformer")
VIT_SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}


@strict
class ToyConfig(VitweaveConfig):
    """One encoder per field; their pooled outputs are joined by one linear layer."""

    model_type = "toy_composite"
    sub_configs = dict.fromkeys(ENCODERS, AutoConfig)

    vit: dict | PreTrainedConfig | None = None
    dinov2: dict | PreTrainedConfig | None = None
    swin: dict | PreTrainedConfig | None = None
    segformer: dict | PreTrainedConfig | None = None
    fused_size: int = 6

    def __post_init__(self, **extra):
        for name in ENCODERS:
            options = getattr(self, name)
            if isinstance(options, dict):
                options = dict(options)
                setattr(self, name, CONFIG_MAPPING[options.pop("model_type")].from_dict(options))
        super().__post_init__(**extra)


class Ramp(nn.Module):
    """Scales features by 1, 1/2, 1/3, ...; the factors are a non-persistent buffer."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("factors", torch.empty(size), persistent=False)
        self.fill_buffers()

    def fill_buffers(self):
        self.factors.copy_(1 / torch.arange(1, len(self.factors) + 1))

    def forward(self, features):
        return features * self.factors


class ToyPreTrainedModel(VitweavePreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "toy"
    built_by = "from_parts"


class ToyModel(ToyPreTrainedModel):
    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.vit_encoder = AutoModel.from_config(config.vit)
        self.dinov2_encoder = AutoModel.from_config(config.dinov2)
        self.swin_encoder = AutoModel.from_config(config.swin)
        self.segformer_encoder = AutoModel.from_config(config.segformer)
        self.mix = nn.Linear(8 + 8 + 16 + 16, config.fused_size)
        self.ramp = Ramp(config.fused_size)
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        tokens = [encoder(pixel_values).last_hidden_state for encoder in (self.vit_encoder, self.dinov2_encoder)]
        tokens.append(self.swin_encoder(pixel_values).last_hidden_state)
        tokens.append(self.segformer_encoder(pixel_values).last_hidden_state.flatten(2).transpose(1, 2))
        pooled = self.ramp(self.mix(torch.cat([encoded.mean(dim=1) for encoded in tokens], dim=-1)))
        return BaseModelOutputWithPooling(last_hidden_state=pooled[:, None], pooler_output=pooled)


class ToyForImageClassification(ToyPreTrainedModel):
    def __init__(self, config: ToyConfig):
        super().__init__(config)
        self.toy = ToyModel(config)
        self.classifier = nn.Linear(config.fused_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values, labels=None, **kwargs):
        logits = self.classifier(self.toy(pixel_values).pooler_output)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def toy_config(drop_path_rate: float = 0.1, **options) -> ToyConfig:
    return ToyConfig(
        vit=ViTConfig(**VIT_SIZES, intermediate_size=16),
        dinov2=Dinov2Config(**VIT_SIZES, mlp_ratio=2),
        swin=SwinConfig(
            image_size=16,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=2,
            mlp_ratio=2,
            drop_path_rate=drop_path_rate,
        ),
        segformer=SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[3, 3],
            strides=[2, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            drop_path_rate=drop_path_rate,
        ),
        **options,
    )


AutoConfig.register("toy_composite", ToyConfig, exist_ok=True)
AutoModel.register(ToyConfig, ToyModel, exist_ok=True)
AutoModelForImageClassification.register(ToyConfig, ToyForImageClassification, exist_ok=True)

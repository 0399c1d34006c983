"""Tiny vanilla ViTs of every family that can be specialised, with weights far from their initial values."""

from collections.abc import Callable

import torch
from transformers import (
    BeitBackbone,
    BeitConfig,
    BeitForImageClassification,
    BeitModel,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTBackbone,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
MLP = {"intermediate_size": 48}
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "fish", 3: "bird", 4: "worm"}}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
BEIT_CLS = {"use_shared_relative_position_bias": True, "use_mean_pooling": False, "use_mask_token": True}

BASE_HOSTS: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": lambda: ViTModel(ViTConfig(**SHAPE, **MLP, pooler_output_size=24)),
    "vit-masked": lambda: ViTModel(ViTConfig(**SHAPE, **MLP), add_pooling_layer=False, use_mask_token=True),
    "vit_mae": lambda: ViTMAEModel(ViTMAEConfig(**SHAPE, **MLP, mask_ratio=0.0)),
    "deit": lambda: DeiTModel(DeiTConfig(**SHAPE, **MLP)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SHAPE)),
    "dinov2-swiglu": lambda: Dinov2Model(Dinov2Config(**SHAPE, use_swiglu_ffn=True)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SHAPE)),
    "dinov3_vit": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SHAPE, **MLP, num_register_tokens=4)),
    "dinov3_vit-gated": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SHAPE, **MLP, use_gated_mlp=True)),
    "beit-mean": lambda: BeitModel(BeitConfig(**SHAPE, **MLP, use_relative_position_bias=True)),
    "beit-cls": lambda: BeitModel(BeitConfig(**SHAPE, **MLP, **BEIT_CLS)),
    "beit-absolute": lambda: BeitModel(
        BeitConfig(**SHAPE, **MLP, use_absolute_position_embeddings=True, layer_scale_init_value=0.0)
    ),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SHAPE, **MLP)),
}
CLASSIFIER_HOSTS: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SHAPE, **MLP, **LABELS)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**SHAPE, **MLP, **LABELS)),
    "deit-distilled": lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**SHAPE, **MLP, **LABELS)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**SHAPE, **LABELS)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersForImageClassification(
        Dinov2WithRegistersConfig(**SHAPE, **LABELS)
    ),
    "beit-mean": lambda: BeitForImageClassification(BeitConfig(**SHAPE, **MLP, **LABELS)),
    "beit-cls": lambda: BeitForImageClassification(BeitConfig(**SHAPE, **MLP, **LABELS, **BEIT_CLS)),
    "clip": lambda: CLIPForImageClassification(CLIPConfig(vision_config={**SHAPE, **MLP}, text_config=TEXT, **LABELS)),
}
BACKBONE_HOSTS: dict[str, Callable[[], PreTrainedModel]] = {
    "dinov2": lambda: Dinov2Backbone(Dinov2Config(**SHAPE, out_indices=[1, 3])),
    "dinov2_with_registers": lambda: Dinov2WithRegistersBackbone(
        Dinov2WithRegistersConfig(**SHAPE, out_indices=[0, 2], reshape_hidden_states=False)
    ),
    "dinov3_vit": lambda: DINOv3ViTBackbone(
        DINOv3ViTConfig(**SHAPE, **MLP, num_register_tokens=4, out_indices=[1, 2], apply_layernorm=False)
    ),
    "beit": lambda: BeitBackbone(BeitConfig(**SHAPE, **MLP, use_relative_position_bias=True, out_indices=[0, 3])),
}


def randomized(model: PreTrainedModel, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The model in evaluation mode with every weight moved away from zero and one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(dtype).eval()


def run_host(model: PreTrainedModel, pixel_values: torch.Tensor, **kwargs):
    """Forward of a host at any image size; MAE sees all patches in their order."""
    if model.config.model_type in ("vit", "deit", "clip", "clip_vision_model", "vit_mae"):
        kwargs["interpolate_pos_encoding"] = True
    if model.config.model_type == "vit_mae":
        patches = (pixel_values.shape[2] // 8) * (pixel_values.shape[3] // 8)
        kwargs["noise"] = torch.arange(patches, dtype=pixel_values.dtype).expand(len(pixel_values), -1)
    with torch.no_grad():
        return model(pixel_values, **kwargs)

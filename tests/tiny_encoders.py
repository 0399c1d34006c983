"""A tiny config of every kind of vision encoder, its model with weights that all show, and images for it."""

import torch
from torch import nn
from transformers import PreTrainedModel

from vitweave.configuration.encoder_configs import resolve_config
from vitweave.modeling.own_models import build_model

PLAIN = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
VIT = {**PLAIN, "intermediate_size": 48}
DINO = {**PLAIN, "mlp_ratio": 2}
CONV = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
SWIN = {
    "embed_dim": 16,
    "depths": [2, 2, 1],
    "num_heads": [2, 2, 2],
    "window_size": 4,
    "image_size": 64,
    "patch_size": 4,
}

CASES = {
    "beit": {**VIT, "use_relative_position_bias": True, "use_mean_pooling": False, "layer_scale_init_value": 0.5},
    "beit-shared": {**VIT, "use_shared_relative_position_bias": True, "use_mean_pooling": True},
    "clip_vision_model": VIT,
    "convnext": CONV,
    "convnextv2": CONV,
    "deit": VIT,
    "dinov2": DINO,
    "dinov2_with_registers": {**DINO, "num_register_tokens": 2},
    "dinov3_convnext": CONV,
    "dinov3_vit": {**VIT, "num_register_tokens": 2},
    "eva02_det_vit": {**VIT, "pretrain_image_size": 24, "window_size": 3, "window_blocks": [0, 2]},
    "ijepa": VIT,
    "internvl_vision": {**VIT, "image_size": (32, 32), "patch_size": (8, 8)},
    "mobilenet_v2": {"depth_multiplier": 0.35},
    "pix2struct_vision_model": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "d_kv": 16,
        "d_ff": 48,
        "patch_embed_hidden_size": 192,  # 8x8 pixels
        "seq_len": 40,
        "max_patches": 24,
    },
    "radio": {
        **PLAIN,
        "mlp_ratio": 2.0,
        "max_img_size": 64,
        "num_cls_tokens": 3,
        "num_registers": 2,
        "summary_idxs": [0, 2],
    },
    "sam_vision_model": {**VIT, "window_size": 2, "global_attn_indexes": [1], "output_channels": 16},
    "segformer": {**CONV, "num_attention_heads": [1, 1, 1, 1], "sr_ratios": [4, 2, 1, 1]},
    "siglip2_vision_model": {**VIT, "num_patches": 16},
    "siglip_vision_model": VIT,
    "specialized_vit": {**PLAIN, "num_register_tokens": 2},
    "specialized_vit-clip": {**PLAIN, "pre_norm": True, "final_norm": "pooled", "specialize_final_norm": True},
    "specialized_vit-mean": {**PLAIN, "num_cls_tokens": 2, "pooling": "mean", "final_norm": "pooled"},
    "specialized_vit-cait": {**PLAIN, "class_attention_layers": 1, "norm_blocks": [], "qkv_blocks": []},
    "swin": SWIN,
    "swinv2": SWIN,
    "vit": VIT,
    "vit_mae": {**VIT, "mask_ratio": 0.0},
    "vit_msn": VIT,
}
MAPS = ("convnext", "convnextv2", "dinov3_convnext", "mobilenet_v2", "sam_vision_model", "segformer", "swin", "swinv2")
FIXED_SIZE = {"sam_vision_model": (32, 32)}  # the native model takes no other


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = build_model(resolve_config({"model_type": name.split("-")[0], **CASES[name]})).eval()
    for parameter in model.parameters():  # larger than the usual start, so that every part shows in the output
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model


def images(name: str, batch: int = 2, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Oblong ones, unless the native model refuses them."""
    height, width = FIXED_SIZE.get(name, size or ((64, 96) if name in MAPS else (32, 48)))
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))

"""Tiny generators of images from several sensors."""

import torch
from transformers import SegformerConfig, SwinConfig, ViTConfig, set_seed

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.modeling_modality_translation import ModalityFusionForImageToImage


def translation_config(modalities=("rgb", "depth"), stages: int = 3, **options) -> ModalityFusionConfig:
    """Stages of stride 2, as the released generator has them, but three."""
    stream = SegformerConfig(
        num_encoder_blocks=stages,
        patch_sizes=[3] * stages,
        strides=[2] * stages,
        hidden_sizes=[32, 32, 64, 64, 64][:stages],
        num_attention_heads=[1, 1, 2, 2, 2][:stages],
        depths=[2, 1, 1, 1, 1][:stages],
        sr_ratios=[4, 2, 1, 1, 1][:stages],
        mlp_ratios=[2] * stages,
    )
    options = {"fusion_type": "token_exchange", "penalty_weight": 1e-3} | options
    return ModalityFusionConfig(modalities=list(modalities), stream_config=stream, **options)


def tiny_generator(modalities=("rgb", "depth"), **options) -> ModalityFusionForImageToImage:
    set_seed(0)
    return ModalityFusionForImageToImage(translation_config(modalities, **options)).eval()


PYRAMIDS = {  # encoders that cannot be run backwards
    "swin": lambda: SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, drop_path_rate=0.0),
    "vit": lambda: ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, patch_size=4, image_size=32
    ),
}


def pyramid_generator(stream: str, modalities=("rgb", "depth"), **options) -> ModalityFusionForImageToImage:
    """Over a Swin of two stages or a ViT of four."""
    set_seed(0)
    options = {"fusion_type": "token_exchange", "decoder_hidden_size": 16} | options
    config = ModalityFusionConfig(modalities=list(modalities), stream_config=PYRAMIDS[stream](), **options)
    return ModalityFusionForImageToImage(config).eval()


def sensor_images(batch=2, modalities=2, size=(32, 48), seed=0) -> torch.Tensor:
    """(batch, modalities, 3, height, width)."""
    return torch.randn(batch, modalities, 3, *size, generator=torch.Generator().manual_seed(seed))


def target_images(batch=2, size=(32, 48), seed=1) -> torch.Tensor:
    """(batch, 3, height, width) in [-1, 1]."""
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1

"""Small models of several modalities, for tests."""

import torch
from transformers import SegformerConfig

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig

NAMES = ("rgb", "depth", "thermal", "event")


def tiny_mit(**changes) -> SegformerConfig:
    sizes = {"hidden_sizes": [32, 32], "depths": [1, 2], "num_attention_heads": [1, 2], "sr_ratios": [2, 1]}
    sizes |= {"num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    return SegformerConfig(**sizes | {"drop_path_rate": 0.0} | changes)


def mit_fusion(modalities: int = 2, **changes) -> ModalityFusionConfig:
    options = {"fusion_type": "gemini", "decoder_hidden_size": 32, "num_labels": 5, "decoder_dropout": 0.0}
    if changes.get("fusion_type", "gemini") == "gemini":
        options["fusion_options"] = {"start": "released"}  # the identity would hide what a sensor does to another
    return ModalityFusionConfig(modalities=NAMES[:modalities], stream_config=tiny_mit(), **options | changes)


def aligned(batch: int = 2, modalities: int = 2, height: int = 32, width: int = 40, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, modalities, 3, height, width, generator=generator)


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight moved a little: what starts at zero or alike would hide mistakes."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()

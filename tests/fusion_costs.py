"""The size of a layer fusion at ViT-B/16 with four layers, counted on the meta device."""

import torch
from torch import nn

from vitweave.modeling.layer_fusion.registry import build_layer_fusion

LAYERS, HIDDEN = 4, 768


def count_weights(name: str, options: dict | None = None) -> int:
    """Weights of all projections and convolutions, without norms, biases and gammas."""
    with torch.device("meta"):
        fusion = build_layer_fusion(name, LAYERS, HIDDEN, options)
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    return sum(module.weight.numel() for module in fusion.modules() if isinstance(module, kinds))

"""What a layer fusion costs: counted, without running it, on the meta device."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitweave.modeling.layer_fusion.base import LayerTokens
from vitweave.modeling.layer_fusion.registry import build_layer_fusion

LAYERS, HIDDEN, GRID = 4, 768, (14, 14)  # ViT-B/16 at 224 pixels


def cost(name: str, options: dict | None = None) -> tuple[int, int]:
    """Parameters without norms, gammas and biases, and multiply-adds per image."""
    patches = GRID[0] * GRID[1]
    with torch.device("meta"):
        fusion = build_layer_fusion(name, LAYERS, HIDDEN, options)
        tokens = LayerTokens(
            torch.empty(1, LAYERS, HIDDEN),
            torch.empty(1, LAYERS, patches, HIDDEN),
            GRID,
            torch.empty(1, HIDDEN),
            torch.empty(1, patches, HIDDEN),
        )
        with FlopCounterMode(display=False) as counter:
            fusion(tokens)
    weights = [m.weight for m in fusion.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    return sum(weight.numel() for weight in weights), counter.get_total_flops() // 2

"""Start values of torch itself, for layers that transformers would draw otherwise."""

import math

from torch import nn
from transformers import initialization as init


def start_as_in_torch(part: nn.Module) -> None:
    """Draw every Linear and Conv2d of `part` as their own constructors do; loaded weights stay as they are."""
    for layer in part.modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
        if layer.bias is not None:
            limit = layer.weight[0].numel() ** -0.5
            init.uniform_(layer.bias, -limit, limit)

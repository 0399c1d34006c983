"""Start values of the parts of a ViT, specialised or not."""

from torch import nn
from transformers import initialization as init

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.specialized_layers import SpecializedViTAttention
from vitweave.modeling.tokens import LayerScale, LowRankDown, LowRankUp
from vitweave.modeling.vit_embeddings import RelativePositionBias, SpecializedViTEmbeddings


def set_vit_start_values(module: nn.Module, config: SpecializedViTConfig) -> None:
    """Draw the parameters that `module` itself holds, and those of a Linear or Conv2d; loaded ones stay as they are."""
    std = config.initializer_range
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        _draw_linear(module, config)
    elif isinstance(module, SpecializedViTEmbeddings):
        init.trunc_normal_(module.cls_token, mean=0.0, std=std)
        for tokens in (module.register_tokens, module.position_embeddings):
            if tokens is not None:
                init.trunc_normal_(tokens, mean=0.0, std=std)
        if module.mask_token is not None:
            init.zeros_(module.mask_token)
    elif isinstance(module, LayerScale):
        init.constant_(module.lambda1, module.value)
    elif isinstance(module, RelativePositionBias):
        init.zeros_(module.relative_position_bias_table)
    elif isinstance(module, SpecializedViTAttention) and config.attention_bias:
        init.normal_(module.bias_k, mean=0.0, std=config.attention_bias_init)
        init.normal_(module.bias_v, mean=0.0, std=config.attention_bias_init)


def _draw_linear(layer: nn.Linear | nn.Conv2d, config: SpecializedViTConfig) -> None:
    if isinstance(layer, LowRankDown):
        init.kaiming_uniform_(layer.weight, a=5**0.5)
    elif isinstance(layer, LowRankUp):
        init.zeros_(layer.weight)
    elif config.cls_init == "equal" and hasattr(layer, "patch_layer"):
        init.copy_(layer.weight, layer.patch_layer[0].weight)  # initialised before its twin
    else:
        init.trunc_normal_(layer.weight, mean=0.0, std=config.initializer_range)
    if layer.bias is not None:
        init.zeros_(layer.bias)

"""What the optimiser decays, and how fast each part learns."""

from torch import nn

# vectors that stand for tokens and positions; decaying them pulls them to zero for no reason
UNDECAYED = ("cls_token", "mask_token", "position_embeddings", "register_tokens", "relative_position_bias_table")


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices: not for norms, biases, LayerScale, tokens and positions.

    The Trainer alone goes by names and `nn.LayerNorm`, and would decay BatchNorm weights and LayerScale's `lambda1`.
    """
    return parameter.ndim > 1 and "bias" not in name and not any(word in UNDECAYED for word in name.split("."))


def find_encoder(model: nn.Module) -> nn.Module:
    """The part of a task model below its head: its `backbone`, its base model or its `encoder`."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # below a PEFT wrapper
    named = [getattr(model, name, None) for name in ("backbone", "base_model", "encoder")]
    encoder = next((part for part in named if isinstance(part, nn.Module) and part is not model), None)
    if encoder is None:
        raise ValueError(f"{type(model).__name__} has neither a backbone, an encoder nor a base model below its head")
    return encoder


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, encoder_lr_scale: float = 1.0
) -> list:
    """Groups for a torch optimiser: decayed or not, encoder (learning rate times `encoder_lr_scale`) or head."""
    encoder = set() if encoder_lr_scale == 1.0 else {id(parameter) for parameter in find_encoder(model).parameters()}
    groups: dict[tuple, list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = encoder_lr_scale if id(parameter) in encoder else 1.0
            groups.setdefault((scale, is_decayed(name, parameter)), []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * scale, "weight_decay": weight_decay if decayed else 0.0}
        for (scale, decayed), parameters in groups.items()
    ]

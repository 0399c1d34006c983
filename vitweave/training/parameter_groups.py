"""What the optimiser decays, and how fast each part learns."""

from torch import nn

from vitweave.modeling.layer_fusion.base import LayerFusion
from vitweave.modeling.modality_fusion.base import ModalityFusion, ModalityNorm

# vectors that stand for tokens and positions; decaying them pulls them to zero for no reason
UNDECAYED = ("cls_token", "mask_token", "position_embeddings", "register_tokens", "relative_position_bias_table")
# what the names of such parameters of layer fusions end in: layers told apart, logits of weights, learned queries
UNDECAYED_ENDINGS = ("_embed", "_logits", "_token", "_scale", "query")


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices: not for norms, biases, LayerScale, gammas, logits, tokens, queries and positions.

    The Trainer alone goes by names and `nn.LayerNorm`, and would decay BatchNorm weights and LayerScale's `lambda1`.
    """
    if parameter.ndim < 2 or "bias" in name or any(word in UNDECAYED for word in name.split(".")):
        return False
    return not name.rpartition(".")[2].endswith(UNDECAYED_ENDINGS)


def find_encoder(model: nn.Module) -> nn.Module:
    """The part of a task model below its head: its `vision_encoder`, `backbone`, base model or `encoder`.

    A model with several encoders, or with trained layers between its encoder and its head, has a `vision_encoder`. The
    base model of a detector holds the whole detector, and the backbone in it.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # below a PEFT wrapper
    base = getattr(model, "base_model", None)
    named = [getattr(model, name, None) for name in ("vision_encoder", "backbone")]
    named += [getattr(base, "backbone", None), base, getattr(model, "encoder", None)]
    encoder = next((part for part in named if isinstance(part, nn.Module) and part is not model), None)
    if encoder is None:
        raise ValueError(f"{type(model).__name__} has neither a backbone, an encoder nor a base model below its head")
    return encoder


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    encoder_lr_scale: float = 1.0,
    fusion_lr_scale: float = 1.0,
) -> list:
    """Groups for a torch optimiser: decayed or not, encoder (learning rate times `encoder_lr_scale`) or head.

    Fusions of layers and of modalities belong to the head, wherever they are, and learn `fusion_lr_scale` times as
    fast: what they add starts at zero, beside the encoder's own output. Tables of embeddings and norms per modality are
    not decayed.
    """
    encoder = set() if encoder_lr_scale == 1.0 else {id(parameter) for parameter in find_encoder(model).parameters()}
    fused = parameters_of(model, (LayerFusion, ModalityFusion))
    tables = parameters_of(model, (nn.Embedding, ModalityNorm))
    groups: dict[tuple, list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = encoder_lr_scale if id(parameter) in encoder else 1.0
            scale = fusion_lr_scale if id(parameter) in fused else scale
            decayed = is_decayed(name, parameter) and id(parameter) not in tables
            groups.setdefault((scale, decayed), []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * scale, "weight_decay": weight_decay if decayed else 0.0}
        for (scale, decayed), parameters in groups.items()
    ]


def parameters_of(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> set[int]:
    """The ids of the parameters in all modules of a kind."""
    modules = [module for module in model.modules() if isinstance(module, kind)]
    return {id(parameter) for module in modules for parameter in module.parameters()}

"""The class token beside each feature map of a backbone, for the heads that read both."""

import inspect
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BackboneOutput

from vitweave.configuration.encoder_facts import encoder_facts

# Backbones of transformers whose hidden states begin with class tokens: the name of the norm their maps have gone
# through where `apply_layernorm` says so, None where there is no such norm.
CLASS_TOKEN_NORMS: dict[str, str | None] = {
    "beit": None,
    "dinov2": "layernorm",
    "dinov2_with_registers": "layernorm",
    "dinov3_vit": "norm",
}


def hands_out_class_tokens(backbone: PreTrainedModel) -> bool:
    """Whether the backbone's forward knows `output_class_tokens` and returns them as `class_tokens`."""
    return "output_class_tokens" in inspect.signature(backbone.forward).parameters


def class_token_request(backbone: PreTrainedModel) -> dict[str, bool]:
    """What to ask of the backbone's forward so that `class_tokens_of` finds what it needs."""
    return {"output_class_tokens" if hands_out_class_tokens(backbone) else "output_hidden_states": True}


def check_class_tokens(backbone: PreTrainedModel, remedy: str):
    """Refuse a backbone without class tokens, or whose class tokens nobody knows how to find."""
    if hands_out_class_tokens(backbone):
        return
    model_type = backbone.config.model_type
    if model_type not in CLASS_TOKEN_NORMS or not encoder_facts(backbone.config).num_class_tokens:
        raise ValueError(
            "the head reads a class token beside every map, which is known of vitweave's backbones and"
            f" {sorted(CLASS_TOKEN_NORMS)}, but not of {type(backbone).__name__} (model_type {model_type!r}); {remedy}"
        )


def class_tokens_of(backbone: PreTrainedModel, outputs: BackboneOutput) -> tuple[Tensor, ...]:
    """One class token (batch, channels) per feature map, normalised as the map is.

    Args:
        outputs: what the backbone returned when asked with `class_token_request`.
    """
    if hands_out_class_tokens(backbone):
        return outputs.class_tokens
    wanted = [backbone.stage_names.index(name) for name in backbone.out_features]
    return tuple(normed(backbone, outputs.hidden_states, stage) for stage in wanted)


def normed(backbone: PreTrainedModel, hidden_states: Sequence[Tensor], stage: int) -> Tensor:
    """The first class token of a stage, (batch, channels)."""
    config, norm = backbone.config, CLASS_TOKEN_NORMS[backbone.config.model_type]
    token = hidden_states[stage][:, 0]
    # DINOv3's backbone normalises its last stage whatever `apply_layernorm` says
    always = config.model_type == "dinov3_vit" and stage == len(backbone.stage_names) - 1
    if norm is not None and (config.apply_layernorm or always):
        token = getattr(backbone, norm)(token)
    return token


def as_asked(
    hidden_states: Sequence[Tensor] | None, asked: bool | int | Sequence[int] | None
) -> Sequence[Tensor | None] | None:
    """What a caller gets who asked for `output_hidden_states=asked` where all were computed for the class tokens."""
    if hidden_states is None or asked is None or isinstance(asked, bool):
        return hidden_states if asked else None
    layers = {layer % len(hidden_states) for layer in ([asked] if isinstance(asked, int) else asked)}
    return tuple(state if index in layers else None for index, state in enumerate(hidden_states))

"""Any text encoder of transformers: built from its config, run, pooled into one vector per text."""

import inspect

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForTextEncoding, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING

from vitweave.modeling.own_models import build_native

# a multiplier of full period modulo 2 ** 64 (Knuth); products of 64-bit integers wrap around
HASH_FACTOR = 6364136223846793005


def build_text_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The text encoder of a config (random weights): of T5 and the like the encoder alone, otherwise `AutoModel`."""
    if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return build_native(AutoModelForTextEncoding, MODEL_FOR_TEXT_ENCODING_MAPPING, config)
    return build_native(AutoModel, MODEL_MAPPING, config)


def check_text_model(model: PreTrainedModel) -> None:
    """Refuse a model that is no text encoder by itself."""
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" not in parameters or "decoder_input_ids" in parameters or hasattr(model.config, "vision_config"):
        raise ValueError(
            f"expected a text encoder, which maps input_ids to a last_hidden_state, got {type(model).__name__}; of a"
            " model of several parts pass the text part, e.g. CLIPTextModel or T5EncoderModel"
        )


def drop_unread_pooler(model: PreTrainedModel) -> None:
    """Leave out a pooler that nobody reads, where the model can do without: its weights would never get a gradient."""
    if "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
        model.pooler = None


def longest_text(model: PreTrainedModel) -> int | None:
    """How many tokens a text may have; None for models without a table of positions or a stated limit."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("position_embedding", "position_embeddings") and isinstance(
            module, nn.Embedding
        ):
            # RoBERTa and its kin count positions from behind the padding index
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return getattr(model.config, "max_position_embeddings", None)


def check_texts(input_ids: Tensor, attention_mask: Tensor | None, sentence_ids: Tensor | None, limit: int | None):
    """Refuse texts that the model cannot take, and texts without a token."""
    if input_ids.ndim != 2:
        raise ValueError(f"expected input_ids (batch, tokens), got the shape {tuple(input_ids.shape)}")
    if limit is not None and input_ids.shape[1] > limit:
        raise ValueError(
            f"expected texts of at most {limit} tokens, which is what the text model has positions for, got"
            f" {input_ids.shape[1]}; cut them with tokenizer(..., truncation=True, max_length={limit})"
        )
    for name, given in (("attention_mask", attention_mask), ("sentence_ids", sentence_ids)):
        if given is not None and given.shape != input_ids.shape:
            raise ValueError(
                f"expected {name} of the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(given.shape)}"
            )
    if attention_mask is None or torch.compiler.is_compiling():
        return
    empty = (~attention_mask.bool().any(dim=1)).nonzero().flatten().tolist()
    if empty or not input_ids.shape[1]:
        raise ValueError(
            f"expected at least one token per text, got none in the texts {empty} of the batch: their captions are"
            " empty. Leave such samples out, or use a tokenizer that adds special tokens"
        )


def run_text_model(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None, **kwargs
) -> BaseModelOutputWithPooling:
    """The model's output; token types are passed on to models that know them (some tokenizers return them always)."""
    if token_type_ids is not None and "token_type_ids" in inspect.signature(model.forward).parameters:
        kwargs["token_type_ids"] = token_type_ids
    return model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)


def pool_text(outputs: BaseModelOutputWithPooling, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """One vector (batch, hidden) per text; `pooling` as in `ImageTextRetrieverConfig.text_pooling`."""
    tokens = outputs.last_hidden_state
    if pooling == "pooler":
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is None:
            raise ValueError('text_pooling="pooler" needs a text model with a pooler; use "mean", "first" or "last"')
        return pooled
    valid = torch.ones_like(tokens[..., 0], dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if pooling == "mean":
        return masked_means(tokens, valid[:, None])[:, 0]
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    if pooling == "first":
        index = torch.where(valid, positions, tokens.shape[1]).amin(dim=1)
    else:
        index = torch.where(valid, positions, -1).amax(dim=1)
    return tokens[torch.arange(len(tokens), device=tokens.device), index]


def masked_means(tokens: Tensor, members: Tensor) -> Tensor:
    """Means of groups of tokens.

    Args:
        tokens: (batch, tokens, hidden).
        members: (batch, groups, tokens), True where a token belongs to a group.

    Returns:
        (batch, groups, hidden); zero for groups without a token.
    """
    weights = members.to(tokens.dtype)
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1)
    return weights @ tokens.masked_fill(~members.any(dim=1)[..., None], 0)


def text_hash(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(batch,) int64, equal for equal texts, whatever their padding."""
    valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
    factors = torch.full_like(input_ids, HASH_FACTOR).where(valid.bool(), torch.ones_like(input_ids)).cumprod(dim=1)
    return ((input_ids + 1) * factors * valid).sum(dim=1)

"""A small language model and its tokenizer from nothing but a corpus, for dry runs and small data."""

from collections.abc import Iterable

from tokenizers import processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from vitweave.training.text_tokenizer import SPECIAL_TOKENS, train_tokenizer

BEGIN, END = SPECIAL_TOKENS["cls_token"], SPECIAL_TOKENS["sep_token"]


def train_causal_tokenizer(
    corpus: Iterable[str], vocab_size: int = 4000, max_length: int = 512, image_token: str = "<image>"
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (`train_tokenizer`) for a language model: text begins with a token, answers end with one.

    Args:
        corpus: texts of the training split, prompts among them.
        image_token: added as a token of its own.
    """
    tokenizer = train_tokenizer(corpus, vocab_size, max_length=max_length)
    begin = [(BEGIN, tokenizer.convert_tokens_to_ids(BEGIN))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=begin
    )
    tokenizer.add_special_tokens({"bos_token": BEGIN, "eos_token": END})
    tokenizer.add_tokens([image_token], special_tokens=True)
    return tokenizer


def small_language_config(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = 192, num_hidden_layers: int = 4, num_attention_heads: int = 3
) -> LlamaConfig:
    """A `LlamaConfig` for a model trained from scratch; the default has 2.6 M parameters at 4000 tokens."""
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError("expected a tokenizer with pad and eos tokens; train_causal_tokenizer makes one")
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=min(tokenizer.model_max_length, 10**6),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )

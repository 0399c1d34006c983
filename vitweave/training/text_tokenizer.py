"""A small tokenizer trained on a corpus, and a small text model that fits it: text without any download."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, PreTrainedTokenizerFast

SPECIAL_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def wordpiece() -> tuple[Tokenizer, type]:
    """Lower-cased words in pieces, continued ones marked by ## (BERT)."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer


def bpe() -> tuple[Tokenizer, type]:
    """Lower-cased byte-level byte pair encoding: no text is unknown to it."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer


def unigram() -> tuple[Tokenizer, type]:
    """Lower-cased unigram language model with the space as part of a piece (SentencePiece)."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer


ALGORITHMS = {"bpe": bpe, "unigram": unigram, "wordpiece": wordpiece}


def train_tokenizer(
    corpus: Iterable[str], vocab_size: int = 4000, algorithm: str = "bpe", max_length: int = 128
) -> PreTrainedTokenizerFast:
    """Train a tokenizer with pad, unk, cls and sep tokens; a text becomes `[CLS] ... [SEP]`.

    The same corpus gives the same "bpe" tokenizer; the others break ties differently in every run: save theirs.

    Args:
        corpus: texts of the training split (those of the other splits would tell it their words).
        vocab_size: the most tokens, special ones included; a small corpus gives fewer.
        algorithm: "bpe" (byte level: no character is unknown), "wordpiece" or "unigram".
        max_length: the most tokens of a text, special ones included.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algorithm!r}; known: {sorted(ALGORITHMS)}")
    texts = [text for text in corpus if text and text.strip()]
    if not texts:
        raise ValueError("expected texts to train a tokenizer on, got none")
    tokenizer, trainer_class = ALGORITHMS[algorithm]()
    special = list(SPECIAL_TOKENS.values())
    options = {"vocab_size": vocab_size, "special_tokens": special, "show_progress": False}
    if algorithm == "bpe":
        options["initial_alphabet"] = sorted(pre_tokenizers.ByteLevel.alphabet())
    if algorithm == "unigram":
        options["unk_token"] = SPECIAL_TOKENS["unk_token"]
    tokenizer.train_from_iterator(texts, trainer_class(**options), length=len(texts))
    cls, sep = SPECIAL_TOKENS["cls_token"], SPECIAL_TOKENS["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B {sep}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL_TOKENS,
    )


def small_text_config(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = 192, num_hidden_layers: int = 4, num_attention_heads: int = 3
) -> BertConfig:
    """A `BertConfig` for a text model trained from scratch; the default has 2.6 M parameters at 4000 tokens."""
    if tokenizer.pad_token_id is None:
        raise ValueError("expected a tokenizer with a pad token, got none; train_tokenizer makes one")
    if tokenizer.model_max_length > 10**6:
        raise ValueError("expected a tokenizer with a model_max_length, for the text model needs that many positions")
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=tokenizer.model_max_length,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
    )

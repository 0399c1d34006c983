"""A tokenizer from a corpus, and a text model that takes what it gives."""

import pytest
import torch
from transformers import AutoTokenizer, BertModel

from vitweave.training.text_tokenizer import ALGORITHMS, small_text_config, train_tokenizer

CORPUS = ["A spring at rest.", "The same spring, stretched.", "A wave moves to the right.", "", "   "] * 3


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_trained_saved_and_loaded(algorithm, tmp_path):
    tokenizer = train_tokenizer(CORPUS, 280, algorithm, max_length=12)
    assert (tokenizer.pad_token, tokenizer.unk_token, tokenizer.cls_token, tokenizer.sep_token) == (
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
    )
    ids = tokenizer("A wave at rest.")["input_ids"]
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    assert tokenizer.unk_token_id not in ids and len(tokenizer) <= 280
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "awaveatrest."
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("A wave at rest.")["input_ids"] == ids and loaded.model_max_length == 12


def test_the_default_knows_every_character_and_comes_out_the_same_again():
    tokenizer = train_tokenizer(CORPUS, 300)
    assert tokenizer.unk_token_id not in tokenizer("λ → 5 µm")["input_ids"]
    assert all(train_tokenizer(CORPUS, 300).get_vocab() == tokenizer.get_vocab() for _ in range(5))


def test_the_text_model_takes_it():
    tokenizer = train_tokenizer(CORPUS, 300, max_length=12)
    config = small_text_config(tokenizer, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert config.vocab_size == len(tokenizer) and config.max_position_embeddings == 12
    batch = tokenizer(["A wave " * 20, "Rest."], padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        assert BertModel(config)(**batch).last_hidden_state.shape == (2, 12, 16)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="unknown algorithm 'words'; known"):
        train_tokenizer(CORPUS, algorithm="words")
    with pytest.raises(ValueError, match="expected texts"):
        train_tokenizer(["", " "])
    tokenizer = train_tokenizer(CORPUS, 300)
    tokenizer.model_max_length = 10**30
    with pytest.raises(ValueError, match="model_max_length"):
        small_text_config(tokenizer)

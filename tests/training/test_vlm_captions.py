"""The sheet of captions, and the small language model."""

import PIL.Image
import pytest
from tiny_vlm_data import coloured

from vitweave.training.small_language_model import small_language_config, train_causal_tokenizer
from vitweave.training.vlm_captions import write_caption_sheet


def test_a_sheet_has_every_picture_and_its_texts(tmp_path):
    pictures = [coloured(index, (60, 30)) for index in range(5)]
    write_caption_sheet(tmp_path / "a.png", pictures, ["a car"] * 5, columns=4, size=100)
    write_caption_sheet(tmp_path / "b.png", pictures, ["a car"] * 5, ["a long truth " * 10] * 5, columns=4, size=100)
    bare, both = PIL.Image.open(tmp_path / "a.png"), PIL.Image.open(tmp_path / "b.png")
    assert bare.width == both.width == 4 * 108 + 8 and both.height > bare.height > 2 * 100
    assert bare.convert("RGB").getpixel((8 + 50, 8 + 50))[0] > 190  # the red one comes first
    with pytest.raises(ValueError, match="expected a caption per picture, got 1 for 5"):
        write_caption_sheet(tmp_path / "c.png", pictures, ["a car"])


def test_a_causal_tokenizer_begins_texts_and_ends_nothing():
    tokenizer = train_causal_tokenizer(["a dog runs", "two dogs run"], vocab_size=300)
    ids = tokenizer("a dog <image>")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.convert_tokens_to_ids("<image>")
    assert tokenizer.eos_token_id not in ids and tokenizer.decode(ids, skip_special_tokens=True).strip() == "a dog"
    config = small_language_config(tokenizer, 32, 1, 2)
    assert config.vocab_size == len(tokenizer) and config.eos_token_id == tokenizer.eos_token_id

"""Figures and captions together: sentence spans for any tokenizer, and nothing cut in silence."""

import pickle

import PIL.Image
import pytest
import torch
from transformers.models.auto.processing_auto import AutoProcessor

from vitweave.processing.image_processing_pil_figure import FigureImageProcessorPil
from vitweave.processing.processing_figure_text import FigureTextProcessor, logger
from vitweave.training.text_tokenizer import ALGORITHMS, train_tokenizer

CAPTIONS = ["(a) A spring at rest. (b) The same spring, stretched.", "A wave. It moves to the right, e.g. in water."]
FIGURE = PIL.Image.new("RGB", (40, 10), "red")


def make(algorithm="wordpiece", max_length=64):
    tokenizer = train_tokenizer(CAPTIONS, 300, algorithm, max_length)
    return FigureTextProcessor(FigureImageProcessorPil(size=32, patch_size=8), tokenizer)


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_sentence_ids_cut_the_caption_at_its_sentences(algorithm):
    processor = make(algorithm)
    encoded = processor(text=CAPTIONS, return_tensors="pt")
    assert set(encoded) == {"input_ids", "attention_mask", "sentence_ids"}
    special = torch.isin(encoded["input_ids"], torch.tensor(processor.tokenizer.all_special_ids))
    assert torch.equal(encoded["sentence_ids"] == -1, special)
    found = [
        processor.tokenizer.decode(ids[which == index]).replace(" ", "")
        for ids, which in zip(encoded["input_ids"], encoded["sentence_ids"], strict=True)
        for index in (0, 1)
    ]
    wanted = ["(a)aspringatrest.", "(b)thesamespring,stretched.", "awave.", "itmovestotheright,e.g.inwater."]
    assert found == wanted


def test_a_list_of_sentences_equals_their_text():
    processor = make()
    as_text, as_list = (
        processor(text=CAPTIONS[1]),
        processor(text=[["A wave.", "It moves to the right, e.g. in water."]]),
    )
    assert as_text["sentence_ids"] == as_list["sentence_ids"] and as_text["input_ids"] == as_list["input_ids"]
    otherwise = processor(text=[["A wave. It moves", "to the right, e.g. in water."]])
    assert otherwise["input_ids"] == as_list["input_ids"] and otherwise["sentence_ids"] != as_list["sentence_ids"]


def test_images_and_text_together():
    encoded = make()([FIGURE, FIGURE], CAPTIONS, return_tensors="pt", padding="max_length", max_length=40)
    assert encoded["pixel_values"].shape == (2, 3, 32, 32) and encoded["patch_mask"].shape == (2, 16)
    assert encoded["input_ids"].shape == (2, 40) and (encoded["sentence_ids"][:, -1] == -1).all()
    assert set(make()(FIGURE)) == {"pixel_values", "patch_mask"}
    larger = make()(FIGURE, "A wave.", images_kwargs={"size": 64}, text_kwargs={"padding": False})
    assert larger["pixel_values"][0].shape == (3, 64, 64)


def test_saved_and_loaded(tmp_path):
    processor = make()
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(loaded) is FigureTextProcessor and type(loaded.image_processor) is FigureImageProcessorPil
    first, second = (one(FIGURE, CAPTIONS[0], return_tensors="pt") for one in (processor, loaded))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert loaded.model_input_names == ["pixel_values", "patch_mask", "input_ids", "attention_mask", "sentence_ids"]


def test_a_long_caption_is_refused_or_cut_and_told_once(monkeypatch):
    processor, told = make(max_length=10), []
    monkeypatch.setattr(logger, "warning", told.append)
    with pytest.raises(ValueError, match=r"caption of second has \d+ tokens, the model takes 10.*truncation=True"):
        processor(text=["A wave.", CAPTIONS[0]], names=["first", "second"])
    for _ in range(2):
        cut = processor(text=["A wave.", CAPTIONS[0]], truncation=True, return_cut_text=True, names=["first", "second"])
    assert cut["cut_text"] == ["", "(b) The same spring, stretched."]
    assert len(cut["input_ids"][1]) == 10 and max(cut["sentence_ids"][1]) == 0
    assert len(told) == 1 and told[0].startswith("1 of 2 captions") and "1 whole sentences" in told[0]
    assert "from second" in told[0]


def test_a_worker_process_gets_the_whole_processor():
    copy = pickle.loads(pickle.dumps(make()))
    assert copy(text=CAPTIONS)["sentence_ids"] == make()(text=CAPTIONS)["sentence_ids"]


def test_bad_input_is_refused():
    processor = make()
    with pytest.raises(ValueError, match="caption of record 1 is empty"):
        processor(text=["A wave.", " "])
    with pytest.raises(ValueError, match="got neither"):
        processor()
    with pytest.raises(TypeError, match="unknown options \\['pading'\\]"):
        processor(text="A wave.", pading=True)
    with pytest.raises(ValueError, match="one name per caption"):
        processor(text="A wave.", names=["a", "b"])

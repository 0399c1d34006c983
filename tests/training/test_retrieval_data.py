"""Retrieval records and samples: sources, missing files, drawn captions, padding."""

import json

import PIL.Image
import pytest
import torch
from datasets import Dataset as HubDataset
from tiny_retriever import tiny_dataset, tiny_processor
from torch.utils.data import DataLoader

from vitweave.training.retrieval_data import RetrievalCollator, RetrievalDataset, text_id
from vitweave.training.retrieval_records import RetrievalRecords, logger, open_records

CAPTIONS = ["A spring. It is stretched.", "A wave.", "A wave.", "(a) One. (b) Two."]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    records = []
    for index, caption in enumerate(CAPTIONS):
        PIL.Image.new("RGB", (40, 20), (60 * index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
        record = {"id": f"fig{index}", "image": f"images/{index}.png", "caption": caption, "extra": index}
        records.append(record | {"split": "test" if index == 3 else "train", "mini": index > 0})
    records[0] |= {"sentences": ["A spring. It is", "stretched."], "description": "A long description."}
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    return tmp_path


def test_a_jsonl_is_read_and_filtered(folder):
    records = open_records(folder)
    assert len(records) == 4 and records[2]["extra"] == 2
    assert records[2]["image"].getpixel((0, 0)) == (120, 0, 0) and records[2]["path"].endswith("images/2.png")
    assert [r["name"] for r in open_records(folder / "captions.jsonl", split="train")] == ["fig0", "fig1", "fig2"]
    assert [r["name"] for r in open_records(folder, "train", {"mini": True, "extra": [2, 7]})] == ["fig2"]
    with pytest.raises(ValueError, match="found none among 4"):
        open_records(folder, "validation")


def test_a_missing_image_is_named_and_stops_or_is_skipped(folder, monkeypatch):
    told = []
    monkeypatch.setattr(logger, "warning", told.append)
    (folder / "images" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 4 images are missing: fig1 .*1\.png.*on_missing='skip'"):
        open_records(folder)
    records = open_records(folder, on_missing="skip")
    assert [r["name"] for r in records] == ["fig0", "fig2", "fig3"] and records.skipped == ["fig1"]
    assert len(told) == 1 and "1 of 4 images are missing: fig1" in told[0]
    with pytest.raises(FileNotFoundError, match="none is left"):
        open_records(folder, where={"id": "fig1"}, on_missing="skip")
    with pytest.raises(ValueError, match="unknown on_missing"):
        open_records(folder, on_missing="ignore")


def test_a_broken_image_or_line_is_named(folder):
    (folder / "images" / "1.png").write_text("no picture")
    dataset = RetrievalDataset.from_source(folder, tiny_processor(CAPTIONS))
    with pytest.raises(ValueError, match=r"1\.png cannot be read"):
        dataset[1]
    with (folder / "captions.jsonl").open("a") as lines:
        lines.write("{broken\n")
    with pytest.raises(ValueError, match=r"captions\.jsonl, line 6 is not JSON"):
        open_records(folder)
    with pytest.raises(FileNotFoundError, match=r"there is no .*other\.jsonl"):
        open_records(folder / "other.jsonl")


def test_a_folder_of_pictures(folder):
    records = open_records(folder / "images")
    assert [r["name"] for r in records] == ["0.png", "1.png", "2.png", "3.png"]


def test_own_sentences_are_kept(folder):
    dataset = RetrievalDataset.from_source(folder, tiny_processor(CAPTIONS), split="train")
    assert dataset.sentences(0) == ["A spring. It is", "stretched."] and dataset.sentences(1) == ["A wave."]
    first = dataset[0]
    words = dataset.processor.tokenizer.decode(first["input_ids"][first["sentence_ids"] == 1]).strip()
    assert words == "stretched." and first["pixel_values"].shape == (3, 64, 64) and first["patch_mask"].sum() == 32


def test_texts_are_drawn_by_seed_epoch_and_index(folder):
    columns = {"text_columns": ("caption", "description")}
    dataset = RetrievalDataset.from_source(folder, tiny_processor(CAPTIONS), draw=True, **columns)
    drawn = []
    for epoch in range(12):
        dataset.set_epoch(epoch)
        drawn.append(str(dataset.text(0)))
        assert dataset.text(1) == "A wave."
    assert len(set(drawn)) == 2
    again = RetrievalDataset.from_source(folder, tiny_processor(CAPTIONS), draw=True, **columns)
    again.set_epoch(5)
    assert str(again.text(0)) == drawn[5]
    other = RetrievalDataset.from_source(folder, tiny_processor(CAPTIONS), draw=True, seed=1, **columns)
    assert [other.set_epoch(epoch) or str(other.text(0)) for epoch in range(12)] != drawn
    still = RetrievalDataset.from_source(folder, tiny_processor(CAPTIONS), **columns)
    assert still.text(0) == ["A spring. It is", "stretched."] and len(still.texts(0)) == 2


def test_several_captions_in_one_column_and_a_hub_dataset():
    pictures = [PIL.Image.new("RGB", (20, 20), (index, 0, 0)) for index in range(2)]
    data = HubDataset.from_dict({"image": pictures, "captions": [["A cat.", "A pet."], ["A dog.", ""]]})
    dataset = RetrievalDataset(data, tiny_processor(CAPTIONS), text_columns=["captions"])
    assert dataset.texts(0) == ["A cat.", "A pet."] and dataset.texts(1) == ["A dog."]
    assert dataset[1]["pixel_values"].shape == (3, 64, 64) and dataset.corpus() == ["A cat.", "A pet.", "A dog."]
    with pytest.raises(ValueError, match=r"no column \['caption'\]"):
        RetrievalDataset(data, tiny_processor(CAPTIONS))


def test_an_empty_caption_names_its_record():
    picture = PIL.Image.new("RGB", (8, 8))
    records = [{"id": "good", "image": picture, "caption": "A wave."}, {"id": "bad", "image": picture, "caption": " "}]
    with pytest.raises(ValueError, match=r"1 of 2 records have an empty caption.*'bad'"):
        RetrievalDataset(records, tiny_processor(CAPTIONS))


def test_a_batch_is_padded():
    dataset = tiny_dataset(4)
    samples = [dataset[0], {**dataset.encode_image(1), **dataset.encode_text("A dot.", 1)}]
    tokenizer = dataset.processor.tokenizer
    batch = RetrievalCollator(tokenizer)(samples)
    short = len(samples[1]["input_ids"])
    assert set(batch) == {
        "pixel_values",
        "patch_mask",
        "input_ids",
        "attention_mask",
        "sentence_ids",
        "caption_ids",
    }
    assert (batch["input_ids"][1, short:] == tokenizer.pad_token_id).all()
    assert (batch["attention_mask"].sum(1) == torch.tensor([len(sample["input_ids"]) for sample in samples])).all()
    assert (batch["sentence_ids"][1, short:] == -1).all() and batch["patch_mask"].dtype == torch.bool
    assert batch["caption_ids"][1] == text_id("A dot.") and batch["caption_ids"].shape == (2,)
    tokenizer.padding_side = "left"
    left = RetrievalCollator(tokenizer)(samples)
    assert torch.equal(left["input_ids"][1, -short:], samples[1]["input_ids"]) and (left["sentence_ids"][1, 0] == -1)


@pytest.mark.slow
def test_workers_see_the_epoch_that_is_set_later(folder):
    columns = {"text_columns": ("caption", "description"), "draw": True}
    dataset = RetrievalDataset.from_source(folder, tiny_processor(CAPTIONS), where={"id": "fig0"}, **columns)
    loader = DataLoader(dataset, 1, num_workers=1, persistent_workers=True, collate_fn=lambda batch: batch[0])
    for epoch in range(6):
        dataset.set_epoch(epoch)
        (sample,) = loader
        assert torch.equal(sample["input_ids"], dataset[0]["input_ids"])


def test_records_from_memory_and_relative_paths(folder):
    records = RetrievalRecords([{"picture": "0.png", "text": "A."}], folder / "images", image_column="picture")
    dataset = RetrievalDataset(records, tiny_processor(CAPTIONS), text_columns=["text"], image_column="picture")
    assert dataset[0]["pixel_values"].shape == (3, 64, 64) and dataset.name(0) == "record 0"
    with pytest.raises(ValueError, match="set image_column"):
        RetrievalRecords([{"picture": "0.png"}], folder)

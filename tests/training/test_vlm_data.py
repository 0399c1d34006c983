"""Records, labels and batches of vision-language training."""

import json

import PIL.Image
import pytest
import torch
from tiny_vlm import tiny_vlm_processor
from tiny_vlm_data import captioned, coloured, mixed_records, tiny_dataset, written

from vitweave.training.vlm_data import VlmCollator, VlmDataset
from vitweave.training.vlm_records import VlmRecords

IMAGE = 4  # <image>
TILING = {"max_tiles": 4}
TEXT_TEMPLATE = (  # of a language model: content is a string
    "{% for m in messages %}{{ '<s>' if loop.first else '' }}{{ m['role'] + ' ' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def said(processor, labels):
    return processor.tokenizer.decode(labels[labels != -100]).replace(" </s>", "</s>")


def test_only_what_the_assistant_says_is_learnt():
    processor = tiny_vlm_processor()
    item = tiny_dataset(1, processor)[0]
    assert said(processor, item["labels"]) == "a red car .</s>"
    learnt = item["labels"] != -100
    assert torch.equal(item["labels"][learnt], item["input_ids"][learnt])
    assert (item["input_ids"] == IMAGE).sum() == 16 and not learnt[item["input_ids"] == IMAGE].any()


def test_ids_are_those_generation_starts_from():
    processor = tiny_vlm_processor(tiling=TILING, image_start_token="<img>", image_end_token="</img>")
    dataset = VlmDataset(mixed_records(), processor)
    for index in range(len(dataset)):
        item = dataset[index]
        prompt = dataset.encode_conversation.segments(dataset.messages(index), "x")[0][0] if index != 1 else None
        if prompt is None or index == 2:
            continue
        pictures = dataset.records.pictures(index)
        expected = processor(pictures, prompt, return_tensors="pt")
        first = int((item["labels"] != -100).nonzero()[0])
        assert torch.equal(item["input_ids"][:first], expected["input_ids"][0])
        assert torch.equal(item["pixel_values"], expected["pixel_values"])
        assert torch.equal(item["num_tiles"], expected["num_tiles"])


def test_every_turn_of_a_conversation_and_several_images():
    processor = tiny_vlm_processor(tiling=TILING)
    dataset = VlmDataset(mixed_records(), processor)
    assert said(processor, dataset[3]["labels"]) == "a cat .</s> one red dog .</s>"
    assert said(processor, dataset[1]["labels"]) == "two dog .</s>"
    assert dataset[1]["num_tiles"].sum() == len(dataset[1]["pixel_values"]) > 2
    assert (dataset[1]["input_ids"] == IMAGE).sum() == 16 * dataset[1]["num_tiles"].sum()
    assert dataset[1]["image_sizes"].tolist() == [[32, 40], [60, 20]]
    assert "pixel_values" not in dataset[2]
    for index in range(4):
        assert dataset.length(index) == len(dataset[index]["input_ids"])


def test_a_batch_mixes_text_and_images():
    processor = tiny_vlm_processor(tiling=TILING)
    dataset = VlmDataset(mixed_records(), processor)
    items = [dataset[index] for index in range(4)]
    batch = VlmCollator(processor.tokenizer)(items)
    lengths = [len(item["input_ids"]) for item in items]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    padding = batch["attention_mask"] == 0
    assert (batch["labels"][padding] == -100).all() and (batch["input_ids"][padding] == 0).all()
    assert len(batch["num_tiles"]) == 4 and batch["num_tiles"].sum() == len(batch["pixel_values"])
    assert set(VlmCollator(processor.tokenizer)(items[2:3])) == {"input_ids", "attention_mask", "labels"}


def test_the_template_of_a_language_model_serves_too():
    processor = tiny_vlm_processor(chat_template=TEXT_TEMPLATE)
    item = tiny_dataset(2, processor)[1]
    assert said(processor, item["labels"]) == "a green car .</s>"
    assert item["input_ids"].tolist().count(1) == 1  # <s> stands in the template, and is not added again


def test_a_template_that_rewrites_earlier_turns_is_refused():
    template = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="turns: the chat template writes earlier turns differently"):
        VlmDataset(mixed_records()[3:], tiny_vlm_processor(chat_template=template))[0]


def test_files_of_a_folder_give_the_same_items(tmp_path):
    processor = tiny_vlm_processor(tiling=TILING)
    records = mixed_records()
    written(tmp_path, records)
    found, expected = VlmDataset.from_source(tmp_path, processor), VlmDataset(records, processor)
    for index in range(4):
        assert all(torch.equal(value, found[index][name]) for name, value in expected[index].items())


def test_paths_in_the_messages_and_a_folder_per_split(tmp_path):
    (tmp_path / "train").mkdir()
    coloured(0).save(tmp_path / "train" / "x.png")
    parts = [{"type": "image", "path": "x.png"}, {"type": "text", "text": "what ?"}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a car"}]}
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps(record))
    item = VlmDataset.from_source(tmp_path, tiny_vlm_processor(), split="train")[0]
    assert len(item["pixel_values"]) == 1


def test_a_picture_on_its_side_is_counted_as_it_is_shown(tmp_path):
    picture = coloured(0, (80, 20))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "side.jpg", exif=exif)
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": "side.jpg", "caption": "a car"}))
    dataset = VlmDataset.from_source(tmp_path, tiny_vlm_processor(tiling=TILING))
    assert dataset.records.sizes(0) == [(80, 20)] and dataset[0]["image_sizes"].tolist() == [[80, 20]]
    assert dataset.tiles(0)[0] == dataset[0]["num_tiles"].tolist()


def test_a_missing_image_stops_or_is_left_out(tmp_path):
    written(tmp_path, captioned(3))
    (tmp_path / "1-0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 records are missing: r1 .*1-0.png.*on_missing='skip'"):
        VlmRecords.open(tmp_path)
    records = VlmRecords.open(tmp_path, on_missing="skip")
    assert len(records) == 2 and records.skipped == ["r1"] and records.name(1) == "r2"


def test_captions_are_drawn_per_epoch():
    records = [{"image": coloured(0), "captions": [f"{word} ." for word in ("red", "green", "blue", "dog")]}]
    processor = tiny_vlm_processor()
    dataset = VlmDataset(records, processor, draw=True, seed=1)
    found = []
    for epoch in range(12):
        dataset.set_epoch(epoch)
        found.append(said(processor, dataset[0]["labels"]))
    assert len(set(found)) == 4
    dataset.set_epoch(3)
    assert said(processor, dataset[0]["labels"]) == found[3]
    fixed = VlmDataset(records, processor)
    fixed.set_epoch(3)
    assert said(processor, fixed[0]["labels"]) == "red .</s>"


def test_long_answers_are_cut_and_images_never():
    processor = tiny_vlm_processor()
    records = [{"id": "long", "image": coloured(0), "caption": "a car " * 40}]
    whole = len(VlmDataset(records, processor)[0]["input_ids"])
    item = VlmDataset(records, processor, max_length=whole - 10)[0]
    assert len(item["input_ids"]) == len(item["labels"]) == whole - 10 and item["labels"][-1] != -100
    with pytest.raises(ValueError, match=r"long: .* are more than the 10 that fit"):
        VlmDataset(records, processor, max_length=10)[0]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": coloured(0), "id": "x"}, "x has neither messages nor a caption"),
        ({"caption": "a", "id": "x"}, "x has a caption but no image"),
    ],
)
def test_records_without_a_part(record, message):
    with pytest.raises(ValueError, match=message):
        VlmRecords([record])


def test_images_and_placeholders_differ():
    turns = [{"role": "user", "content": "<image><image>what"}, {"role": "assistant", "content": "a"}]
    dataset = VlmDataset([{"id": "x", "image": coloured(0), "messages": turns}], tiny_vlm_processor())
    with pytest.raises(ValueError, match=r"^x: .*an image is missing"):
        dataset[0]


def test_nobody_answers():
    dataset = VlmDataset([{"id": "x", "messages": [{"role": "user", "content": "what"}]}], tiny_vlm_processor())
    with pytest.raises(ValueError, match="x: expected an answer of the role 'assistant'"):
        dataset[0]


def test_datasets_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = captioned(3)
    source = datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in ("image", "caption")})
    source = source.cast_column("image", datasets.Image())
    found, expected = VlmDataset(VlmRecords(source), tiny_vlm_processor()), VlmDataset(rows, tiny_vlm_processor())
    assert torch.equal(found[2]["pixel_values"], expected[2]["pixel_values"])
    assert torch.equal(found[2]["labels"], expected[2]["labels"])
    assert isinstance(found.records.pictures(0)[0], PIL.Image.Image)

"""Folders and datasets of classes, and errors that name the file."""

import PIL.Image
import pytest
import torch
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

from vitweave.processing.crop_augmentation import ClassificationAugmentation
from vitweave.training.classification_data import ImageClassificationDataset, collate_classification
from vitweave.training.synthetic_classes import SyntheticClasses

PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})


def write_folders(folder, classes=("cat", "dog"), pictures=2):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(pictures):
            PIL.Image.new("RGB", (20, 30), (90 * number, 40 * index, 0)).save(folder / name / f"{index}.png")
    return folder


def test_a_class_is_a_folder(tmp_path):
    dataset = ImageClassificationDataset.from_folder(write_folders(tmp_path / "train"), PROCESSOR)
    assert dataset.id2label == {0: "cat", 1: "dog"}
    assert [item["labels"] for item in dataset] == [0, 0, 1, 1]
    batch = collate_classification([dataset[0], dataset[3]])
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["labels"].tolist() == [0, 1]
    few = write_folders(tmp_path / "val", ["dog"])
    held_out = ImageClassificationDataset.from_folder(few, PROCESSOR, id2label=dataset.id2label)
    assert [item["labels"] for item in held_out] == [1, 1]


def test_datasets_in_image_folder_layout_give_the_same(tmp_path):
    pytest.importorskip("datasets")
    folder = write_folders(tmp_path / "train")
    ours = ImageClassificationDataset.from_folder(folder, PROCESSOR)
    theirs = ImageClassificationDataset.from_hub(str(tmp_path), "train", PROCESSOR)
    assert theirs.id2label == ours.id2label
    for a, b in zip(ours, theirs, strict=True):
        assert a["labels"] == b["labels"] and torch.equal(a["pixel_values"], b["pixel_values"])


@pytest.mark.parametrize("processor", [PROCESSOR, CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=32)])
def test_augmented_pictures_differ_by_epoch_and_are_not_cropped_again(processor):
    augmentation = ClassificationAugmentation(32, scale=(0.3, 0.6))
    dataset = ImageClassificationDataset(SyntheticClasses(2), processor, augmentation)
    first = dataset[1]["pixel_values"]
    dataset.set_epoch(1)
    second = dataset[1]["pixel_values"]
    dataset.set_epoch(0)
    assert torch.equal(dataset[1]["pixel_values"], first) and not torch.equal(first, second)
    plain = processor(augmentation(dataset.samples[1]["image"], 0, 1), do_resize=False, do_center_crop=False)
    torch.testing.assert_close(first, torch.as_tensor(plain["pixel_values"][0]))


def test_grey_and_transparent_pictures_become_rgb():
    pictures = [PIL.Image.new(mode, (32, 32)) for mode in ("L", "LA", "P", "RGBA", "1")]
    dataset = ImageClassificationDataset([{"image": picture, "label": 0} for picture in pictures], PROCESSOR)
    assert {tuple(item["pixel_values"].shape) for item in dataset} == {(3, 32, 32)}
    assert dataset[3]["pixel_values"].min() == 1  # transparent pixels show a white ground


def test_bad_input_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        ImageClassificationDataset.from_folder(tmp_path / "nowhere", PROCESSOR)
    with pytest.raises(FileNotFoundError, match="found none"):
        ImageClassificationDataset.from_folder(tmp_path, PROCESSOR)
    folder = write_folders(tmp_path / "train")
    with pytest.raises(ValueError, match=r"unknown classes \['dog'\]"):
        ImageClassificationDataset.from_folder(folder, PROCESSOR, id2label={0: "cat"})
    (folder / "cat" / "1.png").write_bytes((folder / "cat" / "1.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cat.1\.png cannot be read"):
        ImageClassificationDataset.from_folder(folder, PROCESSOR)[1]
    picture = PIL.Image.new("RGB", (32, 32))
    for label, message in ((3, "0 to 2, got 3"), (-1, "got -1"), (None, "got None"), (0.5, "got 0.5")):
        dataset = ImageClassificationDataset([{"image": picture, "label": label, "name": "x.jpg"}], PROCESSOR)
        dataset.num_labels = 3
        with pytest.raises(ValueError, match=rf"x\.jpg: expected a class id.*{message}"):
            dataset[0]
    deep = ImageClassificationDataset([{"image": PIL.Image.new("I;16", (32, 32)), "label": 0}], PROCESSOR)
    with pytest.raises(ValueError, match="sample 0: expected an 8-bit picture"):
        deep[0]
    with pytest.raises(ValueError, match="one size"):
        collate_classification([{"pixel_values": torch.zeros(3, size, size), "labels": 0} for size in (4, 5)])
    datasets = pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=r"no column \['image'\].*image_column"):
        ImageClassificationDataset(datasets.Dataset.from_dict({"img": [0], "label": [0]}), PROCESSOR)

"""Folders and `datasets` as training data; epochs reach the augmentation; errors name the file."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from vitweave.processing.augmentation import SegmentationAugmentation
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
from vitweave.training.segmentation_data import SegmentationDataset, collate_segmentation, read_id2label
from vitweave.training.synthetic_shapes import SyntheticShapes

PROCESSOR = SegmentationImageProcessorPil(size=16)
AUGMENTATION = SegmentationAugmentation(crop_size=16)


@pytest.fixture
def folder(tmp_path):
    for part in ("image", "label"):
        (tmp_path / part).mkdir()
    for index, sample in enumerate(SyntheticShapes(3)):
        sample["image"].save(tmp_path / "image" / f"{index}.jpg")
        sample["label"].save(tmp_path / "label" / f"{index}.png")
    (tmp_path / "meta.json").write_text(json.dumps({"id2label": {"0": "background", "1": "disc", "2": "square"}}))
    return tmp_path


def test_a_folder_is_read(folder):
    dataset = SegmentationDataset.from_folder(folder, PROCESSOR)
    batch = collate_segmentation([dataset[index] for index in range(len(dataset))])
    assert batch["pixel_values"].shape == (3, 3, 16, 16) and batch["labels"].shape == (3, 16, 16)
    assert batch["labels"].dtype == torch.int64 and set(batch["labels"].unique().tolist()) <= {0, 1, 2}
    assert read_id2label(folder) == SyntheticShapes.id2label and read_id2label(folder / "image") is None


def test_errors_name_the_file(folder):
    dataset = SegmentationDataset.from_folder(folder, PROCESSOR, num_labels=2)
    with pytest.raises(ValueError, match=r"image/0\.jpg: expected class ids 0 to 1"):
        dataset[0]
    PIL.Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "label" / "1.png")
    for augmentation in (None, AUGMENTATION):
        with pytest.raises(ValueError, match=r"image/1\.jpg: expected a mask as large .* image 32x32 and mask 9x9"):
            SegmentationDataset.from_folder(folder, PROCESSOR, augmentation)[1]
    (folder / "image" / "2.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"2\.jpg cannot be read"):
        dataset[2]


def test_unpaired_and_missing_files_are_refused(folder):
    (folder / "label" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"1 stand alone.*'2'"):
        SegmentationDataset.from_folder(folder, PROCESSOR)
    with pytest.raises(FileNotFoundError, match="image"):
        SegmentationDataset.from_folder(folder / "image", PROCESSOR)


def test_a_real_datasets_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"picture": datasets.Image(), "classes": datasets.Image()})
    rows = [{"picture": sample["image"], "classes": sample["label"]} for sample in SyntheticShapes(2)]
    samples = datasets.Dataset.from_list(rows, features=features)
    dataset = SegmentationDataset(samples, PROCESSOR, image_column="picture", label_column="classes")
    direct = SegmentationDataset(SyntheticShapes(2), PROCESSOR)
    assert torch.equal(dataset[1]["labels"], direct[1]["labels"])
    assert torch.equal(dataset[1]["pixel_values"], direct[1]["pixel_values"])
    with pytest.raises(ValueError, match=r"no column.*picture.*image_column"):
        SegmentationDataset(samples, PROCESSOR)


def test_a_folder_opened_by_load_dataset(folder, tmp_path_factory, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    lines = [{"file_name": f"image/{index}.jpg", "label_file_name": f"label/{index}.png"} for index in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    dataset = SegmentationDataset.from_hub(str(folder), "train", PROCESSOR)
    direct = SegmentationDataset.from_folder(folder, PROCESSOR)
    assert len(dataset) == 3 and torch.equal(dataset[2]["labels"], direct[2]["labels"])


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_see_the_epoch(persistent):
    dataset = SegmentationDataset(SyntheticShapes(4), PROCESSOR, AUGMENTATION)
    loader = DataLoader(
        dataset, batch_size=2, num_workers=2, persistent_workers=persistent, collate_fn=collate_segmentation
    )
    for epoch in (3, 4):
        dataset.set_epoch(epoch)
        seen = torch.cat([batch["pixel_values"] for batch in loader])
        for index in range(4):
            image, _ = AUGMENTATION(*SyntheticShapes(4)[index].values(), epoch, index)
            expected = PROCESSOR(image, return_tensors="pt", do_resize=False)["pixel_values"][0]
            assert torch.equal(seen[index], expected)


def test_images_of_different_size_do_not_stack():
    samples = [SegmentationDataset(SyntheticShapes(1, size), PROCESSOR)[0] for size in (32, 40)]
    assert collate_segmentation(samples)["labels"].shape == (2, 16, 16)
    keeps_size = SegmentationImageProcessorPil(do_resize=False)
    samples = [SegmentationDataset(SyntheticShapes(1, size), keeps_size)[0] for size in (32, 40)]
    with pytest.raises(ValueError, match=r"one size in a batch, got \[\(32, 32\), \(40, 40\)\]"):
        collate_segmentation(samples)

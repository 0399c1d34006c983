"""Folders and `datasets` as depth data; units from the processor; epochs reach the augmentation."""

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader

from vitweave.processing.depth_augmentation import DepthAugmentation
from vitweave.processing.image_processing_pil_depth import DepthImageProcessorPil
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
from vitweave.training.depth_data import DepthDataset, collate_depth

PROCESSOR = DepthImageProcessorPil(size=16, depth_scale=0.001, depth_range=(0.1, 10))
rng = np.random.default_rng(0)
IMAGES = [PIL.Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(4)]
DEPTHS = [rng.integers(500, 9000, (20, 30), dtype=np.uint16) for _ in range(4)]
DEPTHS[0][:5] = 0
SAMPLES = [{"image": image, "depth": depth} for image, depth in zip(IMAGES, DEPTHS, strict=True)]


@pytest.fixture(params=["rgb", "image"])
def folder(tmp_path, request):
    for part in (request.param, "depth"):
        (tmp_path / part).mkdir()
    for index, (image, depth) in enumerate(zip(IMAGES, DEPTHS, strict=True)):
        image.save(tmp_path / request.param / f"{index}.png")
        if index % 2:
            np.save(tmp_path / "depth" / f"{index}.npy", depth)
        else:
            PIL.Image.fromarray(depth).save(tmp_path / "depth" / f"{index}.png")
    return tmp_path


def test_a_folder_is_read(folder):
    dataset = DepthDataset.from_folder(folder, PROCESSOR)
    batch = collate_depth([dataset[index] for index in range(len(dataset))])
    assert batch["pixel_values"].shape == (4, 3, 16, 16) and batch["labels"].shape == (4, 16, 16)
    for index in range(4):
        expected = PROCESSOR(IMAGES[index], DEPTHS[index], return_tensors="pt")
        assert torch.equal(batch["labels"][index], expected["labels"][0])
        assert torch.equal(batch["pixel_values"][index], expected["pixel_values"][0])
    assert batch["labels"].max() <= 9 and (batch["labels"][0] == 0).any()
    assert dataset.samples[2]["name"].endswith("2.png")
    assert [path.stem for path in dataset.samples.sources(3)] == ["3", "3"]


def test_a_list_file_chooses_and_orders(folder):
    (folder / "val.txt").write_text("3\n0\n\n")
    chosen = DepthDataset.from_folder(folder, PROCESSOR, names=folder / "val.txt")
    whole = DepthDataset.from_folder(folder, PROCESSOR)
    assert len(chosen) == 2 and torch.equal(chosen[0]["labels"], whole[3]["labels"])
    assert len(DepthDataset.from_folder(folder, PROCESSOR, names=["1"])) == 1
    with pytest.raises(ValueError, match=r"1 stand alone, among them \['7'\]"):
        DepthDataset.from_folder(folder, PROCESSOR, names=["1", "7"])
    with pytest.raises(FileNotFoundError):
        DepthDataset.from_folder(folder, PROCESSOR, names=folder / "none.txt")


def test_errors_name_the_file(folder):
    dataset = DepthDataset.from_folder(folder, PROCESSOR)
    np.save(folder / "depth" / "1.npy", DEPTHS[1][:7])
    for augmentation in (None, DepthAugmentation()):
        dataset.augmentation = augmentation
        with pytest.raises(ValueError, match=r"1\.png: expected a depth map .* image 20x30 and depth map 7x30"):
            dataset[1]
    np.save(folder / "depth" / "3.npy", DEPTHS[3] / 1000)
    with pytest.raises(ValueError, match=r"3\.png: the declared unit does not fit.*metres: set depth_scale=1"):
        dataset[3]
    (folder / "depth" / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"depth/2\.png cannot be read as a depth map"):
        dataset[2]
    (folder / "depth" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"1 stand alone.*'2'"):
        DepthDataset.from_folder(folder, PROCESSOR)
    with pytest.raises(FileNotFoundError, match=r"rgb/ or image/ and depth/"):
        DepthDataset.from_folder(folder / "depth", PROCESSOR)


def test_a_processor_of_another_task_is_refused():
    with pytest.raises(ValueError, match=r"DepthImageProcessorPil, got .*Segmentation"):
        DepthDataset(SAMPLES, SegmentationImageProcessorPil())


def test_augmented_depth_is_in_metres_and_converted_once():
    augmentation = DepthAugmentation(crop_size=12, scale=(2.0, 2.0), zoom_depth=True)
    item = DepthDataset(SAMPLES, PROCESSOR, augmentation)[1]
    assert item["labels"].shape == item["pixel_values"].shape[-2:] == (12, 12)
    stored = torch.round(item["labels"] * 2000).int()  # the zoom halved the metres
    assert set(stored.unique().tolist()) <= set(DEPTHS[1].ravel().tolist())
    close = DepthImageProcessorPil(size=16, depth_range=(0.001, 0.02))
    depth = np.full((20, 30), 0.004, dtype=np.float32)  # declared, so it passes before and after augmentation
    item = DepthDataset([{"image": IMAGES[0], "depth": depth}], close, augmentation)[0]
    torch.testing.assert_close(item["labels"], torch.full((12, 12), 0.002))


def test_a_real_datasets_dataset():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "depth_map": datasets.Image()})
    rows = [{"image": s["image"], "depth_map": PIL.Image.fromarray(s["depth"])} for s in SAMPLES[:2]]
    samples = datasets.Dataset.from_list(rows, features=features)
    dataset = DepthDataset(samples, PROCESSOR, label_column="depth_map")
    assert torch.equal(dataset[1]["labels"], DepthDataset(SAMPLES, PROCESSOR)[1]["labels"])
    with pytest.raises(ValueError, match=r"no column \['depth'\].*depth_map"):
        DepthDataset(samples, PROCESSOR)


def test_workers_see_the_epoch():
    augmentation = DepthAugmentation(crop_size=12, scale=(0.8, 1.5))
    dataset = DepthDataset(SAMPLES, PROCESSOR, augmentation)
    loader = DataLoader(dataset, batch_size=2, num_workers=1, persistent_workers=True, collate_fn=collate_depth)
    for epoch in (3, 4):
        dataset.set_epoch(epoch)
        seen = torch.cat([batch["labels"] for batch in loader])
        for index in range(4):
            metres = PROCESSOR.read_depth(DEPTHS[index])
            expected = augmentation(IMAGES[index], metres, epoch, index)[1]
            np.testing.assert_array_equal(seen[index], expected)

"""Samples of aligned sensors: folders, absent ones, augmentation alike for all, and one-line predictions."""

import numpy as np
import PIL.Image
import pytest
import torch

from vitweave.processing.image_processing_pil_modality import ModalityImageProcessorPil
from vitweave.training.modality_data import ModalityAugmentation, ModalityDataset, ModalityFolder

SIZE = (16, 24)


def fill(folder, count: int = 3):
    """RGB, depth in millimetres and class maps; the last sample has no depth."""
    rng = np.random.default_rng(0)
    for name in ("rgb", "depth", "label"):
        (folder / name).mkdir()
    for index in range(count):
        pixels = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / "rgb" / f"{index}.png")
        PIL.Image.fromarray(pixels[..., 0] % 4).save(folder / "label" / f"{index}.png")
        if index < count - 1:
            PIL.Image.fromarray(pixels[..., 1].astype(np.uint16) * 20).save(folder / "depth" / f"{index}.png")
    return folder


def processor() -> ModalityImageProcessorPil:
    depth = {"encoding": "metres", "scale": 0.001, "value_range": [0, 10], "invalid": 0}
    return ModalityImageProcessorPil({"rgb": {"encoding": "rgb"}, "depth": depth})


def test_a_missing_file_is_an_absent_sensor(tmp_path):
    dataset = ModalityDataset(ModalityFolder(fill(tmp_path), ["rgb", "depth"]), processor())
    assert [dataset[index]["modality_mask"].tolist() for index in range(3)] == [
        [True, True],
        [True, True],
        [True, False],
    ]
    assert dataset[0]["pixel_values"].shape == (2, 3, *SIZE) and dataset[0]["labels"].shape == SIZE
    hidden = ModalityDataset(dataset.samples, processor(), keep=["rgb"])
    assert hidden[0]["modality_mask"].tolist() == [True, False] and hidden[0]["pixel_values"][1].eq(0).all()


def test_augmentation_is_the_same_for_all_and_depends_on_the_epoch_alone(tmp_path):
    samples = ModalityFolder(fill(tmp_path), ["rgb", "depth"])
    plain = ModalityDataset(samples, processor())[0]
    dataset = ModalityDataset(samples, processor(), ModalityAugmentation(flip=1.0))
    flipped = dataset[0]
    assert torch.equal(flipped["pixel_values"], plain["pixel_values"].flip(-1))
    assert torch.equal(flipped["labels"], plain["labels"].flip(-1))
    cropped = ModalityDataset(samples, processor(), ModalityAugmentation(crop_size=(8, 8)))
    seen = []
    for epoch in range(6):
        cropped.set_epoch(epoch)
        item = cropped[0]
        assert item["pixel_values"].shape == (2, 3, 8, 8) and torch.equal(item["labels"], cropped[0]["labels"])
        seen.append(item["labels"].tolist())
    assert len({str(labels) for labels in seen}) > 1


def test_errors_name_the_sample(tmp_path):
    folder = fill(tmp_path)
    PIL.Image.new("L", (5, 5)).save(folder / "label" / "1.png")
    dataset = ModalityDataset(ModalityFolder(folder, ["rgb", "depth"]), processor())
    with pytest.raises(ValueError, match=r"^1: .*aligned images of one size"):
        dataset[1]
    (folder / "label" / "0.png").unlink()
    with pytest.raises(ValueError, match="1 no map in 'label'"):
        ModalityFolder(folder, ["rgb", "depth"])
    with pytest.raises(FileNotFoundError, match="thermal"):
        ModalityFolder(folder, ["rgb", "thermal"])
    with pytest.raises(ValueError, match="expected keep among"):
        ModalityDataset([], processor(), keep=["lidar"])
    with pytest.raises(ValueError, match="at least the crop"):
        ModalityAugmentation(crop_size=(99, 99))({"pixel_values": torch.zeros(2, 3, 8, 8)}, 0, 0)

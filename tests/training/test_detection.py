"""The detection recipe: samples, collator, and a run of the stock Trainer over a stock detector."""

import numpy as np
import PIL.Image
import pytest
import torch
from stock_hosts import HOSTS
from transformers import AutoModelForObjectDetection
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

from vitweave.modeling.modeling_layer_fusion import LayerFusionBackbone
from vitweave.processing.augmentation import SegmentationAugmentation
from vitweave.training.detection import train_detection
from vitweave.training.detection_data import DetectionDataset, collate_detection
from vitweave.training.synthetic_shapes import SyntheticShapes

pytest.importorskip("scipy", reason="needs scipy")
CLASSES = {1: 0, 2: 1}


@pytest.fixture
def processor():
    return RTDetrImageProcessorPil(size={"height": 64, "width": 64})


def detector():
    torch.manual_seed(0)
    host = next(host for host in HOSTS if host.name == "RTDetrForObjectDetection")
    return host.build("layer_fusion")


def shapes(length: int, processor, seed: int = 0) -> DetectionDataset:
    return DetectionDataset(SyntheticShapes(length, 64, seed), processor, classes=CLASSES)


def test_boxes_follow_the_class_map(processor):
    sample = shapes(4, processor)[1]
    labels = sample["labels"]
    assert sample["pixel_values"].shape == (3, 64, 64)
    assert labels["boxes"].shape == (len(labels["class_labels"]), 4) and labels["orig_size"].tolist() == [64, 64]
    mask = torch.as_tensor(np.array(SyntheticShapes(4, 64)[1]["label"]))
    rows, columns = (mask == 2).nonzero(as_tuple=True)
    if (labels["class_labels"] == 1).sum() == 1:  # a disc may cut the square in two
        box = labels["boxes"][labels["class_labels"] == 1][0] * 64
        assert box[2:].tolist() == [columns.max() - columns.min() + 1, rows.max() - rows.min() + 1]


def test_augmented_boxes_fit_the_augmented_picture(processor):
    red = PIL.Image.new("RGB", (64, 64))
    red.paste((255, 0, 0), (8, 20, 28, 50))
    mask = PIL.Image.new("L", (64, 64))
    mask.paste(1, (8, 20, 28, 50))
    turn = SegmentationAugmentation(64, (0.7, 1.0), vertical_flip=0.5, rotate=True, ignore_index=0)
    dataset = DetectionDataset([{"image": red, "label": mask}] * 8, processor, turn, classes={1: 0})
    places = set()
    for sample in dataset:
        left, top, right, bottom = corners(sample["labels"]["boxes"][0] * 64)
        bright = sample["pixel_values"][0] > 0.7
        rows, columns = bright.nonzero(as_tuple=True)
        edges = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (edges - torch.tensor([left, top, right, bottom])).abs().max() <= 1.5
        places.add((round(left), round(top)))
    assert len(places) > 4


def corners(box: torch.Tensor) -> list[float]:
    return [*(box[:2] - box[2:] / 2).tolist(), *(box[:2] + box[2:] / 2).tolist()]


def test_collator_keeps_a_dict_per_picture(processor):
    batch = collate_detection([shapes(4, processor)[index] for index in range(3)])
    assert batch["pixel_values"].shape == (3, 3, 64, 64) and len(batch["labels"]) == 3
    assert all(type(one) is dict for one in batch["labels"])


def test_a_run_needs_the_processor_to_evaluate(processor, tmp_path):
    with pytest.raises(ValueError, match="got NoneType: expected one with post_process_object_detection"):
        train_detection(detector(), shapes(4, processor), shapes(2, processor, 1), output_dir=tmp_path)


@pytest.mark.slow
def test_trains_keeps_the_best_and_goes_on(processor, tmp_path):
    pytest.importorskip("pycocotools", reason="needs pycocotools")
    options = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    runs = {}
    for name, steps in (("whole", (4,)), ("broken", (2, 4))):
        for count in steps:
            metrics = train_detection(
                detector(),
                shapes(16, processor),
                shapes(4, processor, 1),
                processor,
                tmp_path / name,
                resume=count == 4,
                max_steps=count,
                lr_scheduler_type="constant",
                warmup_steps=0,
                **options,
            )
        runs[name] = AutoModelForObjectDetection.from_pretrained(tmp_path / name)
        assert {"map", "map_50", "map_0", "mar", "loss", "train_loss"} <= {*metrics, "map_0"}
        assert metrics["map"] >= 0 and (tmp_path / name / "preprocessor_config.json").is_file()
    assert any(isinstance(part, LayerFusionBackbone) for part in runs["whole"].modules())
    whole, broken = (run.state_dict() for run in runs.values())
    assert all(torch.equal(value, broken[name]) for name, value in whole.items())

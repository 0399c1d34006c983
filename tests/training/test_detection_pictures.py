"""Pictures of detections: the boxes lie where the objects are."""

from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

from vitweave.training.detection_data import DetectionDataset
from vitweave.training.detection_pictures import write_detections

pytest.importorskip("scipy", reason="needs scipy")


class Finder(torch.nn.Module):
    """Finds one box, and one it is not sure of."""

    config, dtype, device = SimpleNamespace(num_labels=1), torch.float32, torch.device("cpu")

    def forward(self, pixel_values):
        boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.1, 0.1]]])
        return SimpleNamespace(logits=torch.tensor([[[4.0], [-4.0]]]), pred_boxes=boxes)


def test_true_and_found_boxes_are_drawn_where_they_are(tmp_path):
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[10:20, 6:26] = 1
    samples = [{"image": PIL.Image.new("RGB", (60, 40)), "label": PIL.Image.fromarray(mask)}]
    processor = RTDetrImageProcessorPil(size={"height": 32, "width": 32})  # not the shape of the picture

    dataset = DetectionDataset(samples, processor, classes={1: 0})
    write_detections(tmp_path / "boxes.png", Finder(), dataset, height=40)
    sheet = np.asarray(PIL.Image.open(tmp_path / "boxes.png")).astype(int)[:40]
    panels = [sheet[:, left : left + 60] for left in (0, 64, 128)]
    edges = [[(span.min(), span.max()) for span in panel.sum(2).nonzero()] for panel in panels[1:]]
    assert panels[0].sum() == 0
    assert edges[0] == [(10, 20), (6, 26)]
    assert edges[1] == [(10, 30), (15, 45)]

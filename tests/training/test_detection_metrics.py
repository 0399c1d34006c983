"""COCO's average precision against cases computed by hand."""

import builtins
import math

import pytest
import torch

from vitweave.training.detection_metrics import AveragePrecision, DetectionMetrics, predicted_boxes


def target(*boxes, labels=None, size=(100, 100)) -> dict:
    """True boxes given as left, top, right, bottom in pixels."""
    height, width = size
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    centre, lengths = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    relative = torch.cat([centre, lengths], dim=1) / torch.tensor([width, height, width, height])
    labels = torch.zeros(len(boxes), dtype=torch.long) if labels is None else torch.tensor(labels)
    return {"boxes": relative, "class_labels": labels, "orig_size": torch.tensor(size)}


def detection(*boxes, scores, labels=None) -> dict:
    labels = torch.zeros(len(boxes), dtype=torch.long) if labels is None else torch.tensor(labels)
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "scores": torch.tensor(scores)} | {
        "labels": labels
    }


class TestAveragePrecision:
    @pytest.fixture(autouse=True)
    def extra(self):
        pytest.importorskip("pycocotools", reason="needs pycocotools")

    def test_one_hit_one_false_one_missed(self):
        """Of two true boxes the first is found exactly, after a false one: recall 0.5 at precision 0.5.

        COCO reads the precision at 101 recalls from 0 to 1: 51 of them are at most 0.5, so AP = 51 * 0.5 / 101.
        """
        metric = AveragePrecision(1)
        found = detection([0, 0, 40, 40], [60, 60, 70, 70], scores=[0.5, 0.9])
        metric.update([found], [target([0, 0, 40, 40], [50, 0, 90, 40])])
        result = metric.compute()
        assert [result["map"], result["map_50"], result["map_75"]] == pytest.approx([51 * 0.5 / 101] * 3)
        assert result["mar"] == pytest.approx(0.5)
        assert math.isnan(result["map_small"])
        assert result["map_medium"] == pytest.approx(51 / 101)  # the false box is small and does not count there

    def test_the_thresholds_count(self):
        """Overlap 100 x 76 of 100 x 100 pixels is an IoU of 0.76: a hit at 0.5 ... 0.75, six of ten thresholds."""
        metric = AveragePrecision(2)
        pairs = [detection([0, 0, 76, 100], scores=[0.3], labels=[1])], [target([0, 0, 100, 100], labels=[1])]
        metric.update(*pairs)
        result = metric.compute()
        assert [result["map"], result["map_50"], result["map_75"]] == pytest.approx([0.6, 1.0, 1.0])
        assert math.isnan(result["per_class"][0]) and result["per_class"][1] == pytest.approx(0.6)
        metric.reset()
        metric.update(*pairs)
        metric.update([detection(scores=[])], [target([0, 0, 9, 9], labels=[0])])
        assert metric.compute()["map"] == pytest.approx(0.3)  # class 0 was there, and nothing of it was found

    def test_pictures_of_any_shape_and_batches(self):
        whole, parts = AveragePrecision(1), AveragePrecision(1)
        found = [detection([0, 0, 50, 20], scores=[0.8]), detection([5, 5, 25, 45], scores=[0.9])]
        truth = [target([0, 0, 50, 20], size=(30, 120)), target([5, 5, 25, 45], size=(90, 60))]
        whole.update(found, truth)
        for one, other in zip(found, truth, strict=True):
            parts.update([one], [other])
        results = [metric.compute() for metric in (whole, parts)]
        assert [result.pop("per_class") for result in results] == [pytest.approx([1.0])] * 2
        assert results[0] == pytest.approx(results[1], nan_ok=True) and results[0]["map"] == pytest.approx(1.0)

    def test_only_the_surest_are_kept(self):
        metric = AveragePrecision(2, max_detections=2)
        boxes = [[0, 0, 10, 10 + index] for index in range(6)]
        metric.update([detection(*boxes, scores=[0.1, 0.5, 0.3, 0.2, 0.9, 0.4], labels=[0, 0, 0, 1, 1, 1])], [target()])
        assert sorted(metric.found[0][:, 5].round(3).tolist()) == [0.3, 0.4, 0.5, 0.9]

    def test_more_objects_than_coco_expects(self):
        """COCO's own limit of 100 boxes would leave a fifth of these unfound."""
        boxes = [[8 * column, 8 * row, 8 * column + 6, 8 * row + 6] for row in range(10) for column in range(12)]
        found = detection(*boxes, scores=[0.5] * 120)
        recalls = []
        for limit in (100, 200):
            metric = AveragePrecision(1, max_detections=limit)
            metric.update([found], [target(*boxes)])
            recalls.append(metric.compute()["mar"])
        assert recalls == pytest.approx([100 / 120, 1.0])

    def test_wrong_input_is_refused(self):
        metric = AveragePrecision(1)
        with pytest.raises(ValueError, match="same images, got 1 and 0"):
            metric.update([detection(scores=[])], [])
        with pytest.raises(ValueError, match="class_labels from 0 to 0, got"):
            metric.update([detection(scores=[])], [target([0, 0, 9, 9], labels=[1])])

    def test_as_the_trainer_calls_it(self):
        from transformers import EvalPrediction
        from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

        truth = target([10, 20, 50, 60], labels=[1], size=(80, 100))
        logits, boxes = torch.full((1, 3, 2), -9.0), torch.full((1, 3, 4), 0.1)
        logits[0, 2, 1], boxes[0, 2] = 4.0, truth["boxes"][0]
        metrics = DetectionMetrics(RTDetrImageProcessorPil(), {0: "cat", 1: "dog"})
        assert metrics(EvalPrediction((logits, boxes), [truth]), compute_result=False) == {}
        result = metrics(EvalPrediction((logits, boxes), [truth]), compute_result=True)
        assert result["map"] == result["map_dog"] == pytest.approx(1.0) and math.isnan(result["map_cat"])
        assert metrics.precision.truth == []  # the next evaluation starts afresh


def test_pycocotools_is_asked_for(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "pycocotools":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install vitweave\[detection\]"):
        AveragePrecision(1)


def test_logits_and_boxes_are_picked_out():
    logits, boxes = torch.zeros(2, 5, 3), torch.zeros(2, 5, 4)
    picked = predicted_boxes(({"loss_ce": torch.tensor(1.0)}, logits, boxes, torch.zeros(2, 5, 32)))
    assert picked[0] is logits and picked[1] is boxes
    with pytest.raises(ValueError, match="expected logits and boxes first"):
        predicted_boxes((torch.zeros(2, 5, 32), torch.zeros(2, 5, 32)))

"""COCO's average precision of boxes, from pycocotools; memory grows with the boxes, not with images or logits."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

SIZES = ("all", "small", "medium", "large")  # pycocotools' areas: all, below 32^2 pixels, below 96^2, above


def load_coco() -> tuple[type, type]:
    """`COCO` and `COCOeval` of pycocotools."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError("COCO's average precision needs pycocotools: pip install vitweave[detection]") from error
    return COCO, COCOeval


class AveragePrecision:
    """Boxes found and true boxes, image by image, and COCO's figures over all of them.

    Args:
        max_detections: how many boxes per image and class count, the surest ones; COCO's 100 is too few for pictures
            with more objects than that.
    """

    def __init__(self, num_labels: int, max_detections: int = 100):
        load_coco()  # it is missed here, not after the first epoch
        self.num_labels, self.max_detections = num_labels, max_detections
        self.reset()

    def reset(self) -> None:
        # one array per image: rows of left, top, width, height, class, and crowd of a true box or score of a found one
        self.truth, self.found = [], []

    def update(self, detections: Sequence[Mapping], targets: Sequence[Mapping]) -> None:
        """Add images.

        Args:
            detections: per image, as `post_process_object_detection` returns them: scores (n,), labels (n,), boxes
                (n, 4) as left, top, right, bottom in pixels of the original picture.
            targets: per image, as the detection processors make them: boxes (m, 4) as centre x, centre y, width, height
                relative to the picture; class_labels (m,); orig_size (2,), height and width; perhaps iscrowd (m,).
        """
        if len(detections) != len(targets):
            raise ValueError(
                f"expected detections and targets of the same images, got {len(detections)} and {len(targets)}"
            )
        for detection, target in zip(detections, targets, strict=True):
            self.found.append(
                self.surest(**{name: as_array(detection[name]) for name in ("boxes", "scores", "labels")})
            )
            target = {name: as_array(value) for name, value in target.items()}
            labels = target["class_labels"]
            if labels.size and not 0 <= labels.min() <= labels.max() < self.num_labels:
                known = f"class_labels from 0 to {self.num_labels - 1}"
                raise ValueError(f"expected {known}, got {np.unique(labels).astype(int).tolist()}")
            height, width = target["orig_size"]
            centre, size = np.split(target["boxes"].reshape(-1, 4) * [width, height, width, height], 2, axis=1)
            crowd = target.get("iscrowd", np.zeros(len(labels)))
            self.truth.append(np.column_stack([centre - size / 2, size, labels, crowd]))

    def surest(self, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Rows of the surest boxes of each class."""
        order = np.argsort(-scores, kind="stable")
        rank = np.zeros(len(order), dtype=np.int64)  # within the class
        for label in np.unique(labels):
            rank[order[labels[order] == label]] = np.arange((labels == label).sum())
        boxes = boxes.reshape(-1, 4)
        rows = np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], labels, scores])
        return rows[rank < self.max_detections]

    def compute(self) -> dict:
        """map (IoU 0.5 to 0.95), map_50, map_75, map_small, map_medium, map_large (by the area of the true box), mar
        (recall), per_class (map of each class); NaN where there is no true box to find."""
        evaluation = self.evaluate()
        precision = evaluation["precision"][..., -1]  # (IoU, recall, classes, sizes)
        found = {"map": mean_of(precision[..., 0]), "map_50": mean_of(precision[0, ..., 0])}
        found["map_75"] = mean_of(precision[5, ..., 0])
        found |= {f"map_{name}": mean_of(precision[..., index]) for index, name in enumerate(SIZES) if index}
        found["mar"] = mean_of(evaluation["recall"][..., 0, -1])  # (IoU, classes, sizes, detections)
        found["per_class"] = [mean_of(precision[:, :, label, 0]) for label in range(self.num_labels)]
        return found

    def evaluate(self) -> dict[str, np.ndarray]:
        """pycocotools' arrays `precision` and `recall` over all images so far; -1 where there is no true box."""
        COCO, COCOeval = load_coco()
        images = [{"id": index} for index in range(1, len(self.truth) + 1)]
        categories = [{"id": label} for label in range(self.num_labels)]
        truth, found = COCO(), COCO()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
            for coco, rows, last in ((truth, self.truth, "iscrowd"), (found, self.found, "score")):
                coco.dataset = {"images": images, "categories": categories, "annotations": annotations(rows, last)}
                coco.createIndex()
            evaluation = COCOeval(truth, found, "bbox")
            evaluation.params.maxDets = [self.max_detections]
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation.eval


def annotations(rows: list[np.ndarray], last: str) -> list[dict]:
    """The rows of all images as COCO annotations, whose last column is called `last`; ids start at 1."""
    found = []
    for image, boxes in enumerate(rows, start=1):
        for left, top, width, height, label, value in boxes.tolist():
            entry = {"id": len(found) + 1, "image_id": image, "category_id": int(label), last: value}
            found.append({**entry, "bbox": [left, top, width, height], "area": width * height})
    return found


def mean_of(values: np.ndarray) -> float:
    """Mean of what could be measured, NaN if nothing could; -1 marks what could not."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else float("nan")


def as_array(values) -> np.ndarray:
    """A tensor on any device and of any type, or an array, as float64."""
    return torch.as_tensor(values).detach().cpu().double().numpy()


def predicted_boxes(outputs, labels=None) -> tuple[Tensor, Tensor]:
    """`preprocess_logits_for_metrics` of the Trainer: logits (batch, queries, labels) and boxes (batch, queries, 4).

    Every detector of transformers returns these two first, after a dict of losses; the rest (the states of every layer,
    auxiliary logits) is large and no metric needs it.
    """
    tensors = [part for part in outputs if isinstance(part, Tensor)]
    if len(tensors) < 2 or tensors[1].shape[-1] != 4:
        raise ValueError(f"expected logits and boxes first, got {[tuple(part.shape) for part in tensors[:2]]}")
    return tensors[0], tensors[1]


class DetectionMetrics:
    """`compute_metrics` of the Trainer with `batch_eval_metrics=True` and `predicted_boxes`; keeps boxes only.

    Args:
        processor: the detector's image processor, whose `post_process_object_detection` turns logits into boxes.
        id2label: names under which the precision of each class is reported as `map_<name>`, where there are several.
    """

    def __init__(self, processor, id2label: dict[int, str], max_detections: int = 100):
        self.processor, self.names = processor, [id2label[index] for index in range(len(id2label))]
        self.precision = AveragePrecision(len(self.names), max_detections)

    def __call__(self, prediction, compute_result: bool = True) -> dict[str, float]:
        logits, boxes = (torch.as_tensor(part) for part in prediction.predictions)
        sizes = [tuple(int(length) for length in target["orig_size"]) for target in prediction.label_ids]
        outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
        found = self.processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        self.precision.update(found, prediction.label_ids)
        if not compute_result:
            return {}
        metrics = self.precision.compute()
        self.precision.reset()
        per_class = metrics.pop("per_class")
        if len(self.names) > 1:
            metrics |= {f"map_{name}": value for name, value in zip(self.names, per_class, strict=True)}
        return metrics

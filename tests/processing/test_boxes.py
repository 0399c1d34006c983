"""Boxes read off class maps."""

import builtins

import numpy as np
import PIL.Image
import pytest

from vitweave.processing.boxes import boxes_from_mask, coco_annotations

MASK = np.array(
    [
        [2, 2, 2, 2, 2, 0, 0, 0],
        [2, 1, 2, 1, 2, 0, 3, 3],
        [2, 1, 2, 1, 2, 0, 3, 3],
        [2, 2, 2, 2, 2, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 2, 2, 2],
        [0, 1, 1, 0, 0, 2, 2, 2],
        [0, 1, 1, 0, 0, 2, 2, 2],
    ]
)


def found(*args, **kwargs) -> list:
    boxes, labels = boxes_from_mask(*args, **kwargs)
    return [(*map(int, box), int(label)) for box, label in zip(boxes, labels, strict=True)]


def test_every_component_is_an_object():
    objects = [(1, 1, 2, 3, 0), (3, 1, 4, 3, 0), (0, 5, 1, 6, 0), (1, 6, 3, 8, 0)]
    assert found(MASK, {1: 0}, min_size=1) == objects  # the corner at (1, 6) keeps two apart
    assert found(MASK, {1: 0}) == objects[-1:]
    assert found(PIL.Image.fromarray(MASK.astype(np.uint8)), {3: 7, 1: 4}) == [(6, 1, 8, 3, 7), (1, 6, 3, 8, 4)]


def test_a_border_belongs_to_the_nearest_object_that_it_touches():
    objects = found(MASK, {1: 0}, border=2)
    assert len(objects) == 3  # the border around nothing at the lower right is none
    (left, _, middle, *_), (start, _, right, *_) = objects[:2]
    assert (left, right) == (0, 5) and {middle, start} <= {2, 3}  # the shared column goes to either
    assert objects[0][1::2][:2] == (0, 4) and objects[2] == (1, 6, 3, 8, 0)


def test_an_empty_mask_has_no_boxes():
    boxes, labels = boxes_from_mask(np.zeros((4, 5), dtype=np.int64), {1: 0}, border=2)
    assert boxes.shape == (0, 4) and boxes.dtype == np.float32 and labels.shape == (0,)
    assert coco_annotations(boxes, labels, 3) == {"image_id": 3, "annotations": []}
    with pytest.raises(ValueError, match="border class 1 cannot be one of the classes"):
        boxes_from_mask(MASK, {1: 0}, border=1)


def test_coco_form():
    (one,) = coco_annotations(np.array([[1, 2, 4, 6]]), [5], 0)["annotations"]
    assert one == {"bbox": [1.0, 2.0, 3.0, 4.0], "category_id": 5, "area": 12.0, "iscrowd": 0}


def test_scipy_is_asked_for(monkeypatch):
    real = builtins.__import__

    def without_scipy(name, *args, **kwargs):
        if name.split(".")[0] == "scipy":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(ImportError, match=r"pip install vitweave\[detection\]"):
        boxes_from_mask(MASK, {1: 0})

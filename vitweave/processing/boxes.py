"""Boxes of the objects in a class map: what detection needs where only pixels were annotated."""

from collections.abc import Mapping

import numpy as np

from vitweave.processing.label_maps import read_label_map


def boxes_from_mask(
    mask, classes: Mapping[int, int], border: int | None = None, min_size: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """One box per connected component of a class map (height, width).

    Objects of one class that touch come out as one, unless a `border` class keeps them apart. Pixels that touch at a
    corner only belong to different objects.

    Args:
        mask: class ids: PIL picture, array or tensor, see `read_label_map`.
        classes: class id in the mask -> class id of the boxes; other ids are background.
        border: class id of the pixels around every object, which belong to the component nearest to them, as long as
            they touch it; None where the mask has no such class. A border around nothing is no object.
        min_size: objects that are narrower or lower are left out.

    Returns:
        boxes (objects, 4), float32: left, top, right, bottom at the edges of the pixels; class ids (objects,), int64.
    """
    ndimage = load_ndimage()
    mask, boxes, labels = read_label_map(mask), [], []
    if border in classes:
        raise ValueError(f"the border class {border} cannot be one of the classes {sorted(classes)} of the boxes")
    components, offset = np.zeros(mask.shape, dtype=np.int64), 0
    for source, target in classes.items():
        found, count = ndimage.label(mask == source)
        components = np.where(found > 0, found + offset, components)
        labels += [target] * count
        offset += count
    if border is not None and offset:
        components = grown(components, mask == border)
    for window in ndimage.find_objects(components, max_label=offset):
        rows, columns = window
        boxes.append([columns.start, rows.start, columns.stop, rows.stop])
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    kept = (boxes[:, 2:] - boxes[:, :2] >= min_size).all(axis=1)
    return boxes[kept], np.array(labels, dtype=np.int64)[kept]


def grown(components: np.ndarray, border: np.ndarray) -> np.ndarray:
    """Components (height, width), 0 = none, with the border pixels given to the nearest one that they touch."""
    ndimage = load_ndimage()
    rows, columns = ndimage.distance_transform_edt(components == 0, return_distances=False, return_indices=True)
    nearest = np.where(border, components[rows, columns], components)
    regions, _ = ndimage.label((components > 0) | border, structure=np.ones((3, 3)))
    own = regions == regions[rows, columns]  # not across background
    return np.where(own, nearest, components)


def load_ndimage():
    """`scipy.ndimage`, which finds connected components; the losses of transformers' detectors need SciPy, too."""
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ImportError("boxes from masks need SciPy: pip install vitweave[detection]") from error
    return ndimage


def coco_annotations(boxes: np.ndarray, labels: np.ndarray, image_id: int) -> dict:
    """Boxes (objects, 4) as left, top, right, bottom in COCO's form, as transformers' detection processors take it."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    sizes = boxes[:, 2:] - boxes[:, :2]
    entries = [
        {"bbox": [*map(float, box[:2]), *map(float, size)], "category_id": int(label), "area": float(size.prod())}
        for box, size, label in zip(boxes, sizes, labels, strict=True)
    ]
    return {"image_id": image_id, "annotations": [{**entry, "iscrowd": 0} for entry in entries]}

"""Label maps: (height, width) arrays of class ids, and the geometric steps they share with their images."""

import numpy as np
import PIL.Image
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import SizeDict, get_image_size_for_max_height_width

LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # PIL modes with one integer per pixel

MAX_CANVAS = 2**25  # pixels of one image: 5792 x 5792


def read_label_map(label) -> np.ndarray:
    """Class ids of a PIL picture, array or tensor as int64 (height, width); palette pictures give their index."""
    if isinstance(label, PIL.Image.Image):
        if label.mode not in LABEL_MODES:
            raise ValueError(
                f"expected a label picture with one class id per pixel (mode {', '.join(LABEL_MODES)}), got mode "
                f"{label.mode!r}; a colour-coded picture must first be turned into class ids"
            )
        return np.array(label).astype(np.int64)
    array = np.asarray(label)
    if array.ndim != 2:
        raise ValueError(f"expected a label map of shape (height, width), got {array.shape}")
    if array.dtype.kind not in "iub":
        raise ValueError(f"expected whole numbers in the label map, got {array.dtype}; round and cast it to integers")
    return array.astype(np.int64)


def reduce_labels(labels: np.ndarray, ignore_index: int) -> np.ndarray:
    """Make class 0 the ignored one and shift the others down by one, as ADE20K's annotations need."""
    return np.where((labels == 0) | (labels == ignore_index), ignore_index, labels - 1)


def check_label_range(labels: np.ndarray, num_labels: int, ignore_index: int) -> None:
    """Refuse class ids that are neither in [0, num_labels) nor the ignored one."""
    counted = labels[labels != ignore_index]
    if counted.size and (counted.min() < 0 or counted.max() >= num_labels):
        strange = sorted({int(value) for value in np.unique(counted) if not 0 <= value < num_labels})
        raise ValueError(
            f"expected class ids 0 to {num_labels - 1} or {ignore_index} (ignored), got {strange[:10]}; raise "
            "num_labels, set ignore_index, or use do_reduce_labels if the ids start at 1"
        )


def resized_size(image_size: tuple[int, int], size: SizeDict) -> tuple[int, int]:
    """Height and width an image of `image_size` gets under the processor's `size`."""
    if size.height and size.width:
        new_size = size.height, size.width
    elif size.shortest_edge:
        new_size = get_size_with_aspect_ratio(image_size, size.shortest_edge, size.longest_edge)
    elif size.max_height and size.max_width:
        new_size = get_image_size_for_max_height_width(image_size, size.max_height, size.max_width)
    else:
        raise ValueError(f"expected size with height and width, shortest_edge, or max_height and max_width, got {size}")
    check_canvas(new_size, image_size)
    return new_size


def check_canvas(canvas: tuple[int, int], image_size: tuple[int, int]) -> None:
    """Refuse a canvas that is larger than any model's input and many times its image, as of a very long, thin image.

    Args:
        canvas, image_size: (height, width) in pixels.
    """
    area = canvas[0] * canvas[1]
    if min(canvas) < 1 or (area > MAX_CANVAS and area > 4 * image_size[0] * image_size[1]):
        raise ValueError(
            f"expected at most {MAX_CANVAS} pixels to make of an image of {image_size[0]}x{image_size[1]} (height x"
            f" width), got {canvas[0]}x{canvas[1]}; choose another size, or cut a very long image into parts"
        )


def resize_nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest neighbour at pixel centres (PIL's rule), for any integer type: (height, width) -> size."""
    rows, columns = (
        np.minimum(((np.arange(new) + 0.5) * (old / new)).astype(np.int64), old - 1)
        for old, new in zip(labels.shape, size, strict=True)
    )
    return labels[rows[:, None], columns[None, :]]


def divisor_padding(image_size: tuple[int, int], divisor: int | tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, bottom, left and right padding that centres an image on the next multiple of `divisor`."""
    divisors = (divisor, divisor) if isinstance(divisor, int) else divisor
    missing = [-length % step for length, step in zip(image_size, divisors, strict=True)]
    top, left = missing[0] // 2, missing[1] // 2
    return top, missing[0] - top, left, missing[1] - left

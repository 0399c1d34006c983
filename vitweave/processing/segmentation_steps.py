"""What the torchvision and the PIL segmentation processor share: what becomes of the masks and of the logits."""

import numpy as np
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs

from vitweave.processing.image_steps import PairedSteps
from vitweave.processing.label_maps import check_label_range, read_label_map, reduce_labels, resize_nearest
from vitweave.processing.post_processing import semantic_maps


class SegmentationImageProcessorKwargs(ImagesKwargs, total=False):
    """Options beyond those of every image processor.

    do_reduce_labels: class 0 becomes the ignored one, the others move down by one (ADE20K).
    ignore_index: the class id that counts neither in the loss nor in the metrics; also fills padded pixels.
    num_labels: when set, class ids outside [0, num_labels) are refused.
    size_divisor: pad image and mask, centred, to the next multiple of it; a pair is (height, width).
    """

    do_reduce_labels: bool | None
    ignore_index: int | None
    num_labels: int | None
    size_divisor: int | list[int] | tuple[int, ...] | None


class SegmentationSteps(PairedSteps):
    """Image and mask through one geometric transform; class ids are never blended."""

    size = {"height": 512, "width": 512}
    do_reduce_labels = False
    ignore_index = 255
    valid_kwargs = SegmentationImageProcessorKwargs
    resize_advice = "resize one of them (the mask by nearest neighbour)"

    def preprocess(self, images, segmentation_maps=None, **kwargs) -> BatchFeature:
        """`pixel_values` (batch, channels, height, width) and, if maps are given, `labels` (batch, height, width)."""
        return super().preprocess(images, segmentation_maps, **kwargs)

    def list_maps(self, maps) -> list:
        return make_flat_list_of_images(maps, expected_ndims=2)

    def read_map(self, one) -> np.ndarray:
        return read_label_map(one)

    def prepare_map(self, one: np.ndarray, do_reduce_labels, ignore_index, num_labels, **kwargs) -> np.ndarray:
        one = reduce_labels(one, ignore_index) if do_reduce_labels else one
        if num_labels:
            check_label_range(one, num_labels, ignore_index)
        return one

    def resize_map(self, one: np.ndarray, new_size: tuple[int, int], **kwargs) -> np.ndarray:
        return resize_nearest(one, new_size)

    def map_padding(self, ignore_index, **kwargs) -> int:
        return ignore_index

    def post_process_semantic_segmentation(
        self, outputs, target_sizes: list[tuple[int, int]] | None = None, return_segmentation_scores: bool = False
    ) -> list:
        """Class maps (height, width) of `outputs.logits` (batch, num_labels, height, width), at `target_sizes` if set.

        Padding by `size_divisor` is cut off before the logits are resized to a target size. With
        `return_segmentation_scores` each item has `segmentation` and `segmentation_scores` (num_labels, height, width).
        """
        targets = self._checked_targets(outputs.logits, target_sizes)
        size = self.size if self.do_resize else None
        return semantic_maps(outputs.logits, targets, return_segmentation_scores, size, self.size_divisor)

"""What the torchvision and the PIL depth processor share: what becomes of depth maps and of predicted depth."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ImagesKwargs

from vitweave.processing.depth_maps import (
    DEPTH_RESAMPLES,
    read_depth_map,
    resize_depth_bilinear,
    stored_depth,
    warn_outside,
)
from vitweave.processing.image_steps import PairedSteps
from vitweave.processing.label_maps import resize_nearest
from vitweave.processing.post_processing import depth_maps

# Options for maps that are in metres already, such as those `read_depth` returned.
IN_METRES = {"depth_scale": 1.0, "depth_offset": 0.0, "invalid_depth": 0, "depth_range": (0.0, float("inf"))}


class DepthImageProcessorKwargs(ImagesKwargs, total=False):
    """Options beyond those of every image processor.

    depth_scale, depth_offset: metres = stored * depth_scale + depth_offset; 0.001 for maps in millimetres.
    invalid_depth: the stored number that means "nothing measured", None if there is none; NaN and infinity always do.
    depth_range: (nearest, farthest) metres a map can hold; values outside count as not measured and are reported once.
    depth_resample: "nearest" never blends, neither across edges nor with pixels without a measurement; "bilinear"
        blends the measured ones among the four neighbours.
    size_divisor: pad image and map, centred, to the next multiple of it; a pair is (height, width).
    """

    depth_scale: float | int | None
    depth_offset: float | int | None
    invalid_depth: float | int | None
    depth_range: list[float | int] | tuple[float | int, ...] | None
    depth_resample: str | None
    size_divisor: int | list[int] | tuple[int, ...] | None


def check_depth_options(depth_scale, depth_offset, depth_range, depth_resample, **kwargs) -> None:
    """Refuse options with which no map could be read."""
    if depth_scale is None or not 0 < depth_scale < float("inf"):
        raise ValueError(f"expected a positive depth_scale (metres per stored step), got {depth_scale}")
    if depth_offset is None or not abs(depth_offset) < float("inf"):
        raise ValueError(f"expected a finite depth_offset in metres, got {depth_offset}")
    if depth_range is not None and not (len(depth_range) == 2 and 0 <= depth_range[0] < depth_range[1]):
        raise ValueError(f"expected depth_range as (nearest, farthest) metres, got {depth_range}")
    if depth_resample not in DEPTH_RESAMPLES:
        raise ValueError(f"unknown depth_resample {depth_resample!r}; known: {sorted(DEPTH_RESAMPLES)}")


class DepthSteps(PairedSteps):
    """Image and depth map through one geometric transform; the map becomes metres, 0 = no measurement.

    The map is resized to the image's new size by `depth_resample`, after its unit and its range were applied. What
    `size_divisor` pads holds no measurement.
    """

    size = {"height": 480, "width": 640}
    depth_scale = 1.0
    depth_offset = 0.0
    invalid_depth = 0
    depth_range = None
    depth_resample = "nearest"
    valid_kwargs = DepthImageProcessorKwargs
    map_name = "depth map"
    resize_advice = "resize one of them (the depth map by nearest neighbour)"
    augmentation_name = "DepthAugmentation"

    def _set_attributes(self, **kwargs) -> None:
        super()._set_attributes(**kwargs)
        if "invalid_depth" in kwargs:
            self.invalid_depth = kwargs["invalid_depth"]  # None is an answer here, not a question for the default
        check_depth_options(self.depth_scale, self.depth_offset, self.depth_range, self.depth_resample)
        # shared memory, so that what one data loader worker has reported no other reports again
        self._reported = torch.zeros((), dtype=torch.int64).share_memory_()

    def to_dict(self) -> dict[str, Any]:
        saved = super().to_dict()
        saved.pop("_reported", None)
        return saved

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        check_depth_options(**kwargs)
        super()._validate_preprocess_kwargs(**kwargs)

    def preprocess(self, images, depth_maps=None, **kwargs) -> BatchFeature:
        """`pixel_values` (batch, channels, height, width) and, if maps are given, `labels` (batch, height, width).

        Args:
            depth_maps: one per image: paths (.npy, PNG or TIFF of one channel), PIL pictures, arrays, tensors.

        Returns:
            labels are float32 metres, 0 where nothing was measured.
        """
        return super().preprocess(images, depth_maps, **kwargs)

    def read_depth(self, source, **options) -> np.ndarray:
        """One depth map at its own size in metres, 0 = no measurement: (height, width) float32.

        Args:
            options: depth_scale, depth_offset, invalid_depth, depth_range, where they differ from the processor's.
        """
        names = ("depth_scale", "depth_offset", "invalid_depth", "depth_range")
        scale, offset, invalid, depth_range = (options.get(name, getattr(self, name)) for name in names)
        metres, outside = read_depth_map(source, scale, offset, invalid, depth_range)
        if len(outside) and not self._reported:
            self._reported.fill_(1)
            warn_outside(outside, len(outside) + np.count_nonzero(metres), depth_range)
        return metres

    def list_maps(self, maps) -> list:
        if isinstance(maps, (list, tuple)):
            return list(maps)
        alone = isinstance(maps, (str, Path, PIL.Image.Image)) or getattr(maps, "ndim", 2) == 2
        return [maps] if alone else list(maps)

    def read_map(self, one) -> np.ndarray:
        return stored_depth(one)

    def prepare_map(self, one: np.ndarray, **kwargs) -> np.ndarray:
        return self.read_depth(one, **kwargs)

    def resize_map(self, one: np.ndarray, new_size: tuple[int, int], depth_resample, **kwargs) -> np.ndarray:
        return resize_nearest(one, new_size) if depth_resample == "nearest" else resize_depth_bilinear(one, new_size)

    def map_padding(self, **kwargs) -> float:
        return 0.0

    def post_process_depth_estimation(self, outputs, target_sizes: list[tuple[int, int]] | None = None) -> list[dict]:
        """`{"predicted_depth": (height, width)}` per image of `outputs.predicted_depth` (batch, height, width).

        Padding by `size_divisor` is cut off before the depth is resized bilinearly to a target size.
        """
        targets = self._checked_targets(outputs.predicted_depth, target_sizes)
        return depth_maps(outputs.predicted_depth, targets, self.size if self.do_resize else None, self.size_divisor)

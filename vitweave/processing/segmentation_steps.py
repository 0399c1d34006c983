"""What the torchvision and the PIL segmentation processor share: the order of the steps and the checks at the door."""

from typing import Any

import numpy as np
import PIL.Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    ChannelDimension,
    SizeDict,
    infer_channel_dimension_format,
    make_flat_list_of_images,
)
from transformers.processing_utils import ImagesKwargs

from vitweave.processing.label_maps import (
    check_label_range,
    divisor_padding,
    read_label_map,
    reduce_labels,
    resize_nearest,
    resized_size,
)
from vitweave.processing.post_processing import semantic_maps

UNSUPPORTED = ("do_center_crop", "do_pad")  # options of ImagesKwargs that would be accepted and ignored


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


def picture_to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Any 8-bit PIL picture as RGB; transparent pixels show a white ground."""
    if picture.mode.startswith("I") or picture.mode == "F":
        raise ValueError(
            f"expected an 8-bit picture (modes 1, L, LA, P, RGB, RGBA, CMYK, ...), got mode {picture.mode!r}, whose "
            "value range is not known; scale it to 0..255 and convert it to mode 'L' first"
        )
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return picture.convert("RGB")


def rgba_to_rgb(image: np.ndarray) -> np.ndarray:
    """(4, height, width) -> (3, height, width) over white; integers span 0..255, floats 0..1."""
    white = 255.0 if image.dtype.kind in "iu" else 1.0
    alpha = image[3:] / white
    colour = alpha * image[:3] + (1.0 - alpha) * white
    return (np.round(colour) if white == 255.0 else colour).astype(image.dtype)


def channels_first(image, do_convert_rgb: bool | None, input_data_format, channels: int | None) -> np.ndarray:
    """A PIL picture, array or tensor as (channels, height, width).

    Args:
        do_convert_rgb: True makes three channels of 1 (repeated) or 4 (RGBA over white); None does so only where the
            input says what it is (PIL modes, a single channel); False changes nothing.
        channels: how many channels the model's mean and std speak of, or None when that is not known.
    """
    if isinstance(image, PIL.Image.Image):
        image = np.array(image if do_convert_rgb is False else picture_to_rgb(image))
        input_data_format = ChannelDimension.LAST
    image = image.cpu().numpy() if hasattr(image, "cpu") else np.asarray(image)
    if image.ndim == 2:
        image, input_data_format = image[None], ChannelDimension.FIRST
    if input_data_format is None:
        input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
    if input_data_format == ChannelDimension.LAST:
        image = np.moveaxis(image, -1, 0)
    wants_rgb = do_convert_rgb or (do_convert_rgb is None and channels in (3, None))
    if wants_rgb and image.shape[0] == 1:
        image = np.repeat(image, 3, axis=0)
    if do_convert_rgb and image.shape[0] == 4:
        image = rgba_to_rgb(image)
    return np.ascontiguousarray(image)


def check_channels(image, channels: int | None) -> None:
    """Refuse a channel count the mean and std do not speak of; a fourth channel is never guessed to be opacity."""
    got = image.shape[0]
    if got == 4 and channels != 4:
        raise ValueError(
            "expected 3 channels, got an array with 4, which may be RGBA or RGB with a fourth measurement; pass "
            "do_convert_rgb=True (or the PIL picture) if the fourth is opacity, else a mean and std of 4 entries"
        )
    if channels is not None and got != channels:
        raise ValueError(
            f"expected {channels} channels (the length of image_mean), got {got}; give mean and std {got} entries"
        )


class SegmentationSteps:
    """Image and mask through one geometric transform; the backends say how to resize, rescale, normalise and pad."""

    do_resize = True
    size = {"height": 512, "width": 512}
    do_rescale = True
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_convert_rgb = None
    do_reduce_labels = False
    ignore_index = 255
    valid_kwargs = SegmentationImageProcessorKwargs

    def preprocess(self, images, segmentation_maps=None, **kwargs) -> BatchFeature:
        """`pixel_values` (batch, channels, height, width) and, if maps are given, `labels` (batch, height, width)."""
        return super().preprocess(images, segmentation_maps, **kwargs)

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        refused = [name for name in UNSUPPORTED if kwargs.get(name)]
        if refused:
            raise ValueError(f"{refused} not supported here; crop with SegmentationAugmentation, pad with size_divisor")
        super()._validate_preprocess_kwargs(**kwargs)

    def _prepare_images_structure(self, images, expected_ndims: int = 3):
        """Let single-channel arrays (height, width) pass too, alone or in a list."""
        listed = images if isinstance(images, (list, tuple)) else [images]
        if listed and all(getattr(image, "ndim", None) == 2 for image in listed):
            return list(listed)
        return super()._prepare_images_structure(images, expected_ndims=expected_ndims)

    def _preprocess_image_like_inputs(
        self, images, segmentation_maps, do_convert_rgb, input_data_format, return_tensors, device=None, **kwargs
    ) -> BatchFeature:
        mean = kwargs["image_mean"]
        channels = len(mean) if kwargs["do_normalize"] and isinstance(mean, (list, tuple)) else None
        images = self._prepare_image_like_inputs(
            images, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, device=device, channels=channels
        )
        sizes = [tuple(image.shape[-2:]) for image in images]
        data: dict[str, Any] = {}
        if segmentation_maps is not None:
            data["labels"] = self._label_maps(segmentation_maps, sizes, **kwargs)
        if kwargs["do_resize"]:
            new_sizes = [resized_size(size, kwargs["size"]) for size in sizes]
            images = [
                self.resize(image, SizeDict(height=height, width=width), kwargs["resample"])
                for image, (height, width) in zip(images, new_sizes, strict=True)
            ]
        images = [self.to_pixel_values(image, **kwargs) for image in images]
        if kwargs["size_divisor"]:
            images = [
                self.pad_edges(image, divisor_padding(image.shape[-2:], kwargs["size_divisor"])) for image in images
            ]
        data = {"pixel_values": images, **data}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _label_maps(self, segmentation_maps, sizes: list[tuple[int, int]], **kwargs) -> list[np.ndarray]:
        """Label maps checked against their images and taken through the same resize and padding."""
        maps = [read_label_map(label) for label in make_flat_list_of_images(segmentation_maps, expected_ndims=2)]
        if len(maps) != len(sizes):
            raise ValueError(f"expected one mask per image, got {len(sizes)} images and {len(maps)} masks")
        ignore_index = kwargs["ignore_index"]
        for index, (labels, size) in enumerate(zip(maps, sizes, strict=True)):
            if labels.shape != size:
                raise ValueError(
                    f"expected a mask as large as its image, got image {size[0]}x{size[1]} and mask {labels.shape[0]}x"
                    f"{labels.shape[1]} (height x width); resize one of them (the mask by nearest neighbour)"
                )
            labels = reduce_labels(labels, ignore_index) if kwargs["do_reduce_labels"] else labels
            if kwargs["num_labels"]:
                check_label_range(labels, kwargs["num_labels"], ignore_index)
            if kwargs["do_resize"]:
                labels = resize_nearest(labels, resized_size(size, kwargs["size"]))
            if kwargs["size_divisor"]:
                top, bottom, left, right = divisor_padding(labels.shape, kwargs["size_divisor"])
                labels = np.pad(labels, ((top, bottom), (left, right)), constant_values=ignore_index)
            maps[index] = labels
        return maps

    def post_process_semantic_segmentation(
        self, outputs, target_sizes: list[tuple[int, int]] | None = None, return_segmentation_scores: bool = False
    ) -> list:
        """Class maps (height, width) of `outputs.logits` (batch, num_labels, height, width), at `target_sizes` if set.

        Padding by `size_divisor` is cut off before the logits are resized to a target size. With
        `return_segmentation_scores` each item has `segmentation` and `segmentation_scores` (num_labels, height, width).
        """
        logits = outputs.logits
        if target_sizes is not None and len(target_sizes) != len(logits):
            raise ValueError(f"expected one target size per image, got {len(target_sizes)} for {len(logits)} images")
        size = self.size if self.do_resize else None
        return semantic_maps(logits, target_sizes, return_segmentation_scores, size, self.size_divisor)

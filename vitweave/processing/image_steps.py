"""What every image processor here shares: any picture to channels first, and one geometry for an image and its map."""

from typing import Any

import numpy as np
import PIL.Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, SizeDict, infer_channel_dimension_format

from vitweave.processing.label_maps import divisor_padding, resized_size

MAX_SIDE = 2**14
SIZE_NAMES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
UNSUPPORTED = ("do_center_crop", "do_pad")  # options of ImagesKwargs that would be accepted and ignored


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


def check_sides(name: str, size) -> None:
    """Refuse sides that no image has, of a `size` or a `size_divisor`."""
    if size is None:
        return
    sides = [size] if isinstance(size, int | float) else size.values() if isinstance(size, dict) else list(size)
    if hasattr(size, "shortest_edge"):
        sides = [getattr(size, each, None) for each in SIZE_NAMES]
    strange = [side for side in sides if side is not None and (not isinstance(side, int) or not 1 <= side <= MAX_SIDE)]
    if strange:
        raise ValueError(f"expected whole numbers of 1 to {MAX_SIDE} pixels as {name}, got {strange[0]!r:.100}")


class PictureSteps:
    """Defaults of every image processor here, and single-channel arrays let through."""

    do_resize = True
    do_rescale = True
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_convert_rgb = None

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        for name in ("size", "size_divisor", "patch_size"):
            check_sides(name, kwargs.get(name))
        super()._validate_preprocess_kwargs(**kwargs)

    def _prepare_images_structure(self, images, expected_ndims: int = 3):
        """Let single-channel arrays (height, width) pass too, alone or in a list."""
        listed = images if isinstance(images, (list, tuple)) else [images]
        if listed and all(getattr(image, "ndim", None) == 2 for image in listed):
            return list(listed)
        return super()._prepare_images_structure(images, expected_ndims=expected_ndims)


class PairedSteps(PictureSteps):
    """An image and the map that belongs to it through one geometric transform.

    The backends (`PilSteps`, `TorchvisionSteps`) say how to resize, rescale, normalise and pad an image; the task says
    what its maps are: `list_maps`, `read_map`, `prepare_map`, `resize_map` and `map_padding`.
    """

    map_name = "mask"  # what messages call the map
    resize_advice = "resize one of them"
    augmentation_name = "SegmentationAugmentation"

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        refused = [name for name in UNSUPPORTED if kwargs.get(name)]
        if refused:
            raise ValueError(f"{refused} not supported here; crop with {self.augmentation_name}, pad with size_divisor")
        super()._validate_preprocess_kwargs(**kwargs)

    def _preprocess_image_like_inputs(
        self, images, maps, do_convert_rgb, input_data_format, return_tensors, device=None, **kwargs
    ) -> BatchFeature:
        mean = kwargs["image_mean"]
        channels = len(mean) if kwargs["do_normalize"] and isinstance(mean, (list, tuple)) else None
        images = self._prepare_image_like_inputs(
            images, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, device=device, channels=channels
        )
        sizes = [tuple(image.shape[-2:]) for image in images]
        data: dict[str, Any] = {}
        if maps is not None:
            data["labels"] = self._labels(maps, sizes, **kwargs)
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

    def _labels(self, maps, sizes: list[tuple[int, int]], **kwargs) -> list[np.ndarray]:
        """Maps checked against their images and taken through the same resize and padding."""
        maps = [self.read_map(one) for one in self.list_maps(maps)]
        if len(maps) != len(sizes):
            raise ValueError(
                f"expected one {self.map_name} per image, got {len(sizes)} images and {len(maps)} {self.map_name}s"
            )
        for one, size in zip(maps, sizes, strict=True):
            if one.shape != size:
                raise ValueError(
                    f"expected a {self.map_name} as large as its image, got image {size[0]}x{size[1]} and "
                    f"{self.map_name} {one.shape[0]}x{one.shape[1]} (height x width); {self.resize_advice}"
                )
        return [self._finish_map(one, **kwargs) for one in maps]

    def _finish_map(self, one: np.ndarray, **kwargs) -> np.ndarray:
        one = self.prepare_map(one, **kwargs)
        if kwargs["do_resize"]:
            one = self.resize_map(one, resized_size(one.shape, kwargs["size"]), **kwargs)
        if kwargs["size_divisor"]:
            top, bottom, left, right = divisor_padding(one.shape, kwargs["size_divisor"])
            one = np.pad(one, ((top, bottom), (left, right)), constant_values=self.map_padding(**kwargs))
        return one

    def _checked_targets(self, predictions, target_sizes):
        """The target sizes of a post-processing step, None for each image if none are given."""
        if target_sizes is None:
            return [None] * len(predictions)
        if len(target_sizes) != len(predictions):
            raise ValueError(
                f"expected one target size per image, got {len(target_sizes)} for {len(predictions)} images"
            )
        return target_sizes

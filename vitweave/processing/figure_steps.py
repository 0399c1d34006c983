"""What the torchvision and the PIL figure processor share: the whole figure on a white canvas, and its patches."""

import numpy as np
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from vitweave.processing.image_steps import PictureSteps


class FigureImageProcessorKwargs(ImagesKwargs, total=False):
    """Options beyond those of every image processor.

    patch_size: the model's patch size, a number or (height, width); `patch_mask` counts such patches.
    pad_color: what surrounds the figure, one number or one per channel, 0 to 255.
    """

    patch_size: int | list[int] | tuple[int, ...] | None
    pad_color: int | list[int] | tuple[int, ...] | None


def figure_box(image_size: tuple[int, int], size: tuple[int, int], do_resize: bool = True) -> tuple[int, int, int, int]:
    """Where a figure lies on its canvas: as large as fits without cutting, aspect ratio kept, centred.

    Args:
        image_size: (height, width) of the figure.
        size: (height, width) of the canvas.

    Returns:
        top, left, height, width in pixels of the canvas.
    """
    height, width = image_size
    if do_resize:
        scale = min(size[0] / height, size[1] / width)
        height, width = (
            min(max(1, round(length * scale)), limit) for length, limit in zip(image_size, size, strict=True)
        )
    if height > size[0] or width > size[1]:
        raise ValueError(
            f"a figure of {height}x{width} (height x width) does not fit on {size[0]}x{size[1]} without being cut off; "
            "use do_resize=True or a larger size"
        )
    return (size[0] - height) // 2, (size[1] - width) // 2, height, width


def covered_patches(box: tuple[int, int, int, int], size: tuple[int, int], patch_size: tuple[int, int]) -> np.ndarray:
    """Which patches hold at least one pixel of the figure: (patches,) bool, row by row.

    Args:
        box: top, left, height, width of the figure on a canvas of `size` (height, width).
    """
    covered = []
    for start, length, total, step in zip(box[:2], box[2:], size, patch_size, strict=True):
        edges = np.arange(0, total, step)
        covered.append((edges + step > start) & (edges < start + length))
    return (covered[0][:, None] & covered[1][None, :]).ravel()


def as_pair(value) -> tuple[int, int]:
    """A number or (height, width) as (height, width)."""
    return (value, value) if isinstance(value, int) else tuple(value)


def check_figure_options(size, patch_size, do_center_crop=None, do_pad=None, **kwargs) -> None:
    """Refuse options under which a figure would lose its edges or patches would not fill the canvas."""
    if do_center_crop:
        raise ValueError("do_center_crop would cut axes and outer panels off; figures are resized and padded instead")
    if do_pad is False:
        raise ValueError("do_pad=False: figures keep their aspect ratio and are always padded to `size`")
    if size is None or not (size.height and size.width):
        raise ValueError(f"expected size as one number or {{'height': ..., 'width': ...}}, got {size}")
    steps = as_pair(patch_size)
    if min(steps) < 1 or size.height % steps[0] or size.width % steps[1]:
        raise ValueError(
            f"expected a size divisible by the patch size, got {size.height}x{size.width} and patches of "
            f"{steps[0]}x{steps[1]} (height x width)"
        )


def check_value_range(image) -> None:
    """Refuse whole numbers beyond 8 bits, whose white is not known."""
    kind = str(image.dtype)
    if "int" in kind and not kind.endswith("uint8") and (image.max() > 255 or image.min() < 0):
        raise ValueError(
            f"expected whole numbers from 0 to 255 or floats from 0 to 1, got {kind} from {int(image.min())} to "
            f"{int(image.max())}; divide a 16-bit figure by 257 and cast it to uint8"
        )


class FigureSteps(PictureSteps):
    """A figure resized as a whole onto a padded canvas of one size; nothing is cut off.

    Scientific figures are wide or tall, and their axes and outer panels stand at the edge, where the usual resize and
    centre crop loses them. Transparent pixels show white.
    """

    size = {"height": 224, "width": 224}
    resample = PILImageResampling.BICUBIC
    patch_size = 16
    pad_color = 255
    valid_kwargs = FigureImageProcessorKwargs
    model_input_names = ["pixel_values", "patch_mask"]

    def _set_attributes(self, **kwargs) -> None:
        super()._set_attributes(**kwargs)
        check_figure_options(self.size, self.patch_size, self.do_center_crop, self.do_pad)

    def _validate_preprocess_kwargs(self, **kwargs) -> None:
        check_figure_options(**kwargs)
        super()._validate_preprocess_kwargs(**kwargs)

    def preprocess(self, images, **kwargs) -> BatchFeature:
        """`pixel_values` (batch, channels, height, width) and `patch_mask` (batch, patches) bool, False on padding."""
        return super().preprocess(images, **kwargs)

    def _preprocess_image_like_inputs(
        self, images, do_convert_rgb, input_data_format, return_tensors, device=None, **kwargs
    ) -> BatchFeature:
        mean = kwargs["image_mean"]
        channels = len(mean) if kwargs["do_normalize"] and isinstance(mean, (list, tuple)) else None
        images = self._prepare_image_like_inputs(
            images, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, device=device, channels=channels
        )
        placed = [self._place(image, **kwargs) for image in images]
        data = {"pixel_values": [pixels for pixels, _ in placed], "patch_mask": [mask for _, mask in placed]}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _place(self, image, size: SizeDict, patch_size, pad_color, do_resize, resample, **kwargs) -> tuple:
        """One figure on its canvas, and which patches it covers."""
        check_value_range(image)
        canvas = (size.height, size.width)
        box = figure_box(tuple(image.shape[-2:]), canvas, do_resize)
        top, left, height, width = box
        if (height, width) != tuple(image.shape[-2:]):
            image = self.resize(image, SizeDict(height=height, width=width), resample)
        colour = self._colour_like(image, pad_color, kwargs["do_rescale"])
        margins = (top, canvas[0] - top - height, left, canvas[1] - left - width)
        pixels = self.pad_edges(self.to_pixel_values(image, **kwargs), margins, self.to_pixel_values(colour, **kwargs))
        return pixels, covered_patches(box, canvas, as_pair(patch_size))

    def _colour_like(self, image, pad_color, do_rescale):
        """The padding as an image (channels, 1, 1) in the units of `image`."""
        channels = image.shape[0]
        colour = np.asarray([pad_color] * channels if isinstance(pad_color, int) else pad_color, dtype=np.float64)
        if colour.shape != (channels,) or colour.min() < 0 or colour.max() > 255:
            raise ValueError(
                f"expected pad_color as a number from 0 to 255 or {channels} of them, one per channel, got {pad_color}"
            )
        if not do_rescale and "float" in str(image.dtype):
            colour = colour / 255  # floats that are not rescaled span 0 to 1 already
        pixel = image[:, :1, :1] * 0
        for channel, value in enumerate(colour):
            pixel[channel] = value
        return pixel

"""Training augmentation of image and mask as a pure function of (seed, epoch, sample index)."""

import numpy as np
import PIL.Image
from PIL import ImageEnhance

from vitweave.processing.image_steps import picture_to_rgb
from vitweave.processing.label_maps import read_label_map, resize_nearest


def jitter_colours(image: PIL.Image.Image, rng: np.random.Generator, strength: float) -> PIL.Image.Image:
    """Brightness, contrast and saturation each times a factor from [1 - strength, 1 + strength]."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(1 - strength, 1 + strength))
    return image


def pad_to_at_least(image: np.ndarray, mask: np.ndarray, size: tuple[int, int], fill: int, ignore_index: int):
    """Pad below and to the right where image (height, width, 3) and mask (height, width) are smaller than `size`."""
    missing = [(0, max(0, want - length)) for want, length in zip(size, mask.shape, strict=True)]
    image = np.pad(image, (*missing, (0, 0)), constant_values=fill)
    return image, np.pad(mask, missing, constant_values=ignore_index)


def random_crop(
    image: np.ndarray, mask: np.ndarray, size: tuple[int, int] | None, rng: np.random.Generator, ignore_index: int
) -> tuple[np.ndarray, np.ndarray]:
    """One random window of image (height, width, 3) and mask (height, width), padded where they are smaller."""
    if size is None:
        return image, mask
    image, mask = pad_to_at_least(image, mask, size, fill=128, ignore_index=ignore_index)
    top, left = (int(rng.integers(length - crop + 1)) for length, crop in zip(mask.shape, size, strict=True))
    window = (slice(top, top + size[0]), slice(left, left + size[1]))
    return image[window], mask[window]


class SegmentationAugmentation:
    """Random scale, crop, flips, quarter turns and colour jitter, the same for image and mask.

    The draw depends on `(seed, epoch, index)` and on nothing else: not on workers, order, process count or earlier
    draws, so a resumed run sees what the uninterrupted one saw.

    Args:
        crop_size: (height, width) of what comes out, or one number for a square; None keeps the scaled size.
        scale: the image is resized by a factor drawn from this range; the paper protocols use 0.5 to 2.
        flip, vertical_flip: probabilities; a vertical flip suits images without an up (microscopy, aerial).
        rotate: turn by 0, 90, 180 or 270 degrees with equal chance; needs a square crop.
        color_jitter: strength for brightness, contrast and saturation, 0 for none.
        ignore_index: the class id of padded pixels; the image is padded with middle grey, which normalises to 0.
    """

    def __init__(
        self,
        crop_size: int | tuple[int, int] | None = None,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        vertical_flip: float = 0.0,
        rotate: bool = False,
        color_jitter: float = 0.0,
        seed: int = 0,
        ignore_index: int = 255,
    ):
        self.crop_size = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
        if rotate and (self.crop_size is None or self.crop_size[0] != self.crop_size[1]):
            raise ValueError(f"quarter turns need a square crop_size, got {crop_size}; set one or rotate=False")
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"expected 0 < scale[0] <= scale[1], got {scale}")
        if not 0 <= color_jitter < 1:
            raise ValueError(f"expected a color_jitter strength in [0, 1), got {color_jitter}")
        self.scale, self.flip, self.vertical_flip, self.rotate = scale, flip, vertical_flip, rotate
        self.color_jitter, self.seed, self.ignore_index = color_jitter, seed, ignore_index

    def __call__(
        self, image: PIL.Image.Image, mask: PIL.Image.Image | np.ndarray, epoch: int, index: int
    ) -> tuple[PIL.Image.Image, np.ndarray]:
        """A picture and its class ids (height, width), augmented for this epoch and sample index, as RGB and int64."""
        if not isinstance(image, PIL.Image.Image):
            raise ValueError(f"expected a PIL picture to augment, got {type(image).__name__}; use PIL.Image.fromarray")
        image, mask = picture_to_rgb(image), read_label_map(mask)
        if (image.height, image.width) != mask.shape:
            raise ValueError(
                f"expected a mask as large as its image, got image {image.height}x{image.width} and mask "
                f"{mask.shape[0]}x{mask.shape[1]} (height x width)"
            )
        rng = np.random.default_rng([self.seed, epoch, index])
        factor = rng.uniform(*self.scale)
        height, width = (max(1, round(length * factor)) for length in mask.shape)
        image = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
        if self.color_jitter:
            image = jitter_colours(image, rng, self.color_jitter)
        mask = resize_nearest(mask, (height, width))
        pixels, mask = random_crop(np.asarray(image), mask, self.crop_size, rng, self.ignore_index)
        pixels, mask = self._turn(pixels, mask, rng)
        return PIL.Image.fromarray(np.ascontiguousarray(pixels)), np.ascontiguousarray(mask)

    def _turn(self, pixels: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Flips and quarter turns; every draw is made even if unused, so that one option does not shift the others."""
        mirror, upside_down, quarter_turns = (
            rng.random() < self.flip,
            rng.random() < self.vertical_flip,
            rng.integers(4),
        )
        pixels, mask = (array[:, ::-1] if mirror else array for array in (pixels, mask))
        pixels, mask = (array[::-1] if upside_down else array for array in (pixels, mask))
        return tuple(np.rot90(array, quarter_turns if self.rotate else 0) for array in (pixels, mask))

"""Training augmentation of image and depth as a pure function of (seed, epoch, sample index)."""

import numpy as np
import PIL.Image

from vitweave.processing.augmentation import jitter_colours, random_crop
from vitweave.processing.image_steps import picture_to_rgb
from vitweave.processing.label_maps import resize_nearest

GREY = (128, 128, 128)  # what is turned in from outside of the image; it normalises to about 0


class DepthAugmentation:
    """Random scale, small rotation, crop, mirroring and colour jitter, the same for image and depth.

    The draw depends on `(seed, epoch, index)` and on nothing else, and each option draws for itself, so that switching
    one on does not change what the others do. Depth is never blended; pixels from outside hold no measurement.

    Args:
        crop_size: (height, width) of what comes out, or one number for a square; None keeps the size.
        scale: image and depth map are resized by a factor drawn from this range.
        zoom_depth: divide the depth by that factor, as if the camera had come closer; without it the same scene seems
            taken with another focal length.
        flip: probability of mirroring left and right.
        rotate: degrees; turn by an angle from [-rotate, rotate] (the published recipes for NYU use 2.5, for KITTI 1).
        color_jitter: strength for brightness, contrast and saturation, 0 for none.
    """

    def __init__(
        self,
        crop_size: int | tuple[int, int] | None = None,
        scale: tuple[float, float] = (1.0, 1.0),
        zoom_depth: bool = False,
        flip: float = 0.5,
        rotate: float = 0.0,
        color_jitter: float = 0.0,
        seed: int = 0,
    ):
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"expected 0 < scale[0] <= scale[1], got {scale}")
        if not 0 <= color_jitter < 1:
            raise ValueError(f"expected a color_jitter strength in [0, 1), got {color_jitter}")
        if not 0 <= rotate <= 45:
            raise ValueError(f"expected a small angle to rotate by, 0 to 45 degrees, got {rotate}")
        self.crop_size = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
        self.scale, self.zoom_depth, self.flip, self.rotate = scale, zoom_depth, flip, rotate
        self.color_jitter, self.seed = color_jitter, seed

    def __call__(
        self, image: PIL.Image.Image, depth: np.ndarray, epoch: int, index: int
    ) -> tuple[PIL.Image.Image, np.ndarray]:
        """A picture and its depth (height, width) in metres, 0 = no measurement, augmented; as RGB and float32."""
        if not isinstance(image, PIL.Image.Image):
            raise ValueError(f"expected a PIL picture to augment, got {type(image).__name__}; use PIL.Image.fromarray")
        image, depth = picture_to_rgb(image), np.asarray(depth, dtype=np.float32)
        if (image.height, image.width) != depth.shape:
            raise ValueError(
                f"expected a depth map as large as its image, got image {image.height}x{image.width} and depth map "
                f"{'x'.join(map(str, depth.shape))} (height x width)"
            )
        rng = np.random.default_rng([self.seed, epoch, index])
        colours = np.random.default_rng(rng.integers(2**63))
        factor, angle, mirror = rng.uniform(*self.scale), rng.uniform(-self.rotate, self.rotate), rng.random()
        height, width = (max(1, round(length * factor)) for length in depth.shape)
        image = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
        depth = resize_nearest(depth, (height, width)) / np.float32(factor if self.zoom_depth else 1)
        if self.rotate:
            image = image.rotate(angle, PIL.Image.Resampling.BILINEAR, fillcolor=GREY)
            depth = np.array(PIL.Image.fromarray(depth).rotate(angle, PIL.Image.Resampling.NEAREST, fillcolor=0))
        if self.color_jitter:
            image = jitter_colours(image, colours, self.color_jitter)
        pixels, depth = random_crop(np.asarray(image), depth, self.crop_size, rng, ignore_index=0)
        if mirror < self.flip:
            pixels, depth = pixels[:, ::-1], depth[:, ::-1]
        return PIL.Image.fromarray(np.ascontiguousarray(pixels)), np.ascontiguousarray(depth)

"""Training augmentation of pictures for classification, as a pure function of (seed, epoch, sample index)."""

import math

import numpy as np
import PIL.Image

from vitweave.processing.augmentation import jitter_colours
from vitweave.processing.image_steps import picture_to_rgb

ATTEMPTS = 10


class ClassificationAugmentation:
    """Random resized crop (arXiv:1409.4842), horizontal flip and colour jitter.

    The draw depends on `(seed, epoch, index)` and on nothing else: not on workers, order, process count or earlier
    draws, so a resumed run sees what the uninterrupted one saw.

    Args:
        crop_size: (height, width) of what comes out, or one number for a square.
        scale: the share of the picture's area that is kept is drawn from this range. The common 0.08 suits large
            photographs; small sets and objects that fill the picture want 0.35 or more.
        ratio: width / height of the window, drawn evenly in the logarithm.
        flip: probability of a mirror image.
        color_jitter: strength for brightness, contrast and saturation, 0 for none.
    """

    def __init__(
        self,
        crop_size: int | tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        color_jitter: float = 0.0,
        seed: int = 0,
    ):
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"expected 0 < scale[0] <= scale[1] <= 1 (shares of the area), got {scale}")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"expected 0 < ratio[0] <= ratio[1] (width / height), got {ratio}")
        if not 0 <= color_jitter < 1:
            raise ValueError(f"expected a color_jitter strength in [0, 1), got {color_jitter}")
        self.crop_size = (crop_size, crop_size) if isinstance(crop_size, int) else tuple(crop_size)
        self.scale, self.ratio, self.flip, self.color_jitter, self.seed = scale, ratio, flip, color_jitter, seed

    def __call__(self, image: PIL.Image.Image, epoch: int, index: int) -> PIL.Image.Image:
        """The picture of this epoch and sample index, as RGB of `crop_size`."""
        if not isinstance(image, PIL.Image.Image):
            raise ValueError(f"expected a PIL picture to augment, got {type(image).__name__}; use PIL.Image.fromarray")
        image = picture_to_rgb(image)
        rng = np.random.default_rng([self.seed, epoch, index])
        window = self._window(image.width, image.height, rng)
        height, width = self.crop_size
        image = image.resize((width, height), PIL.Image.Resampling.BICUBIC, box=window)
        if rng.random() < self.flip:
            image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        return jitter_colours(image, rng, self.color_jitter) if self.color_jitter else image

    def _window(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in pixels; the largest centred window if none of the drawn ones fits."""
        low, high = (math.log(end) for end in self.ratio)
        for _ in range(ATTEMPTS):
            area, ratio = width * height * rng.uniform(*self.scale), math.exp(rng.uniform(low, high))
            wide, tall = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
            if wide <= width and tall <= height:
                left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - tall + 1))
                return left, top, left + wide, top + tall
        wide, tall = min(width, round(height * self.ratio[1])), min(height, round(width / self.ratio[0]))
        left, top = (width - wide) // 2, (height - tall) // 2
        return left, top, left + wide, top + tall

"""Every sample twice, as it is and mirrored: the one augmentation that a feature cache can hold."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
from PIL import ImageOps


def mirrored(value):
    """A picture or map (height, width) with left and right exchanged; anything else as it is."""
    if isinstance(value, PIL.Image.Image):
        return ImageOps.mirror(value)
    return np.ascontiguousarray(value[:, ::-1]) if getattr(value, "ndim", 0) == 2 else value


class MirroredSamples(Sequence):
    """Twice as many samples: first all of them as they are, then all of them mirrored.

    Unlike a random flip it gives the same images in every epoch, so that a frozen encoder's features can be cached.

    Args:
        samples: dicts of pictures and maps, such as `DepthFolderSamples` or `FolderSamples`.
    """

    def __init__(self, samples: Sequence):
        self.samples = samples

    def __len__(self) -> int:
        return 2 * len(self.samples)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        sample = self.samples[index % len(self.samples)]
        return sample if index < len(self.samples) else {name: mirrored(value) for name, value in sample.items()}

    def sources(self, index: int) -> tuple:
        """What a sample is made from, its files where they are known, and whether it is mirrored."""
        original = index % len(self.samples)
        known = hasattr(self.samples, "sources")
        parts = self.samples.sources(original) if known else self.samples[original].values()
        return (*parts, str(index >= len(self.samples)))

"""Discs and squares on noise: segmentation samples without any file, for dry runs and tests."""

from collections.abc import Sequence

import numpy as np
import PIL.Image


class SyntheticShapes(Sequence):
    """Pictures (size x size) with one disc (class 1) and one square (class 2); sample `index` is always the same."""

    id2label = {0: "background", 1: "disc", 2: "square"}

    def __init__(self, length: int, size: int = 32, seed: int = 0):
        self.length, self.size, self.seed = length, size, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        rng = np.random.default_rng([self.seed, index])
        rows, columns = np.mgrid[: self.size, : self.size]
        (top, left), (middle, centre) = rng.integers(0, self.size // 2, 2), rng.integers(0, self.size, 2)
        edge, radius = rng.integers(self.size // 4, self.size // 2, 2)
        label = np.zeros((self.size, self.size), dtype=np.uint8)
        label[top : top + edge, left : left + edge] = 2
        label[(rows - middle) ** 2 + (columns - centre) ** 2 < radius**2] = 1
        colours = np.array([[60, 60, 60], [200, 90, 60], [60, 120, 200]])
        image = colours[label] + rng.normal(0, 25, (self.size, self.size, 3))
        image = PIL.Image.fromarray(image.clip(0, 255).astype(np.uint8))
        return {"image": image, "label": PIL.Image.fromarray(label)}


class SyntheticDepth(SyntheticShapes):
    """The same pictures with a depth map in metres: the square 1, the disc 2 and what is behind them 4 metres away."""

    metres = np.array([4.0, 2.0, 1.0], dtype=np.float32)  # by class

    def __getitem__(self, index: int) -> dict:
        sample = super().__getitem__(index)
        return {"image": sample["image"], "depth": self.metres[np.array(sample["label"])]}

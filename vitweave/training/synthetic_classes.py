"""One shape on noise: classification samples without any file, for dry runs and tests."""

from collections.abc import Sequence

import numpy as np
import PIL.Image


class SyntheticClasses(Sequence):
    """Pictures (size x size) of a disc, a square or a cross in any colour; sample `index` is always the same."""

    id2label = {0: "disc", 1: "square", 2: "cross"}

    def __init__(self, length: int, size: int = 32, seed: int = 0):
        self.length, self.size, self.seed = length, size, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        rng = np.random.default_rng([self.seed, index])
        label = index % len(self.id2label)
        radius = self.size * rng.uniform(0.25, 0.4)
        rows, columns = np.mgrid[: self.size, : self.size] - rng.uniform(radius, self.size - radius, (2, 1, 1))
        rows, columns = np.abs(rows), np.abs(columns)
        inside = [
            rows**2 + columns**2 < radius**2,
            np.maximum(rows, columns) < radius * 0.9,
            (np.minimum(rows, columns) < radius * 0.3) & (np.maximum(rows, columns) < radius),
        ][label]
        colours = np.array([[60, 60, 60], rng.integers(120, 256, 3)])
        image = colours[inside.astype(int)] + rng.normal(0, 15, (self.size, self.size, 3))
        return {"image": PIL.Image.fromarray(image.clip(0, 255).astype(np.uint8)), "label": label}

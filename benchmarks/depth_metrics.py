"""Depth metrics against the published per-image NumPy loop, and the memory an evaluation takes per image.

    python benchmarks/depth_metrics.py [--tiny]

Prints milliseconds of one CPU per image (medians, interleaved) and MiB per image over 500 images of `evaluate_depth`.
`--tiny` runs both on a few small images and writes no results.
"""

import argparse
import statistics
import time
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from timing import mib_per_image, resident_mib, row, write_results
from torch import nn

from vitweave.training import depth_evaluation
from vitweave.training.depth_evaluation import evaluate_depth
from vitweave.training.depth_metrics import DEPTH_METRICS, DepthMetrics

FULL, TINY = (480, 640), (48, 64)
LOW, HIGH = 1e-3, 10.0


class PublishedLoop:
    """The published evaluation, image by image: clamp, mask with the Eigen crop, then one formula after the other."""

    def __init__(self):
        self.results = []

    def update(self, predictions: np.ndarray, labels: np.ndarray) -> None:
        for prediction, truth in zip(predictions, labels, strict=True):
            prediction = prediction.copy()
            prediction[prediction < LOW] = LOW
            prediction[prediction > HIGH] = HIGH
            prediction[np.isinf(prediction)] = HIGH
            prediction[np.isnan(prediction)] = LOW
            valid = np.logical_and(truth > LOW, truth < HIGH)
            window, (height, width) = np.zeros(valid.shape), valid.shape
            rows, columns = (int(45 * height / 480), int(471 * height / 480)), (41 * width // 640, 601 * width // 640)
            window[slice(*rows), slice(*columns)] = 1
            valid = np.logical_and(valid, window)
            self.results.append(self.errors(truth[valid], prediction[valid]))

    @staticmethod
    def errors(truth: np.ndarray, prediction: np.ndarray) -> list[float]:
        ratio = np.maximum(truth / prediction, prediction / truth)
        within = [(ratio < 1.25**k).mean() for k in (1, 2, 3)]
        rmse = np.sqrt(((truth - prediction) ** 2).mean())
        rmse_log = np.sqrt(((np.log(truth) - np.log(prediction)) ** 2).mean())
        abs_rel = np.mean(np.abs(truth - prediction) / truth)
        sq_rel = np.mean((truth - prediction) ** 2 / truth)
        difference = np.log(prediction) - np.log(truth)
        silog = np.sqrt(np.mean(difference**2) - np.mean(difference) ** 2) * 100
        log10 = np.abs(np.log10(truth) - np.log10(prediction)).mean()
        return [abs_rel, sq_rel, rmse, log10, rmse_log, silog, *within]

    def compute(self) -> dict[str, float]:
        return dict(zip(DEPTH_METRICS, np.mean(self.results, axis=0), strict=True))


def random_depth(holes: float, batch: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """One batch of float32 labels with holes, and predictions some ten percent off."""
    rng = np.random.default_rng(0)
    labels = rng.uniform(0.5, 9.9, (batch, *size)).astype(np.float32)
    predictions = (labels * np.exp(rng.normal(0, 0.2, labels.shape))).astype(np.float32)
    labels[rng.random(labels.shape) < holes] = 0
    return predictions, labels


def compare_speed(name: str, holes: float, batch: int, size: tuple[int, int], rounds: int) -> dict:
    arrays = random_depth(holes, batch, size)
    tensors = [torch.from_numpy(values) for values in arrays]
    ours, published, ratios = DepthMetrics("nyu_eigen"), PublishedLoop(), []
    for _ in range(rounds):
        start = time.thread_time()
        ours.update(*tensors)
        middle = time.thread_time()
        published.update(*arrays)
        ratios.append((1e3 * (middle - start) / batch, 1e3 * (time.thread_time() - middle) / batch))
    fast, slow = (statistics.median(times) for times in zip(*ratios, strict=True))
    ratio = statistics.median(slow / fast for fast, slow in ratios)
    print(f"{size[0]}x{size[1]}, {name}, ms per image: {fast:.2f}, published loop {slow:.2f}, {ratio:.1f}x")
    found, expected = ours.compute(), published.compute()
    if not np.allclose([found[key] for key in DEPTH_METRICS], [expected[key] for key in DEPTH_METRICS], rtol=1e-4):
        raise SystemExit(f"the two do not agree: {found} and {expected}")
    return row(f"depth metrics of an image, {name}: published loop / ours", ratio, ">= 10")


class OneConvolution(nn.Module):
    """Depth from one layer: the memory seen is the evaluation's, not the model's."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1)

    def forward(self, pixel_values):
        return SimpleNamespace(predicted_depth=self.layer(pixel_values)[:, 0].exp())


class Memory(DepthMetrics):
    """Notes the resident memory after every batch."""

    readings = []

    def update(self, predictions, labels) -> None:
        super().update(predictions, labels)
        self.readings.append(resident_mib())


def measure_memory(images: int, size: tuple[int, int]) -> dict:
    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return images

        def __getitem__(self, index):
            if index >= images:
                raise IndexError(index)
            return {
                "pixel_values": torch.zeros(3, *size),
                "labels": torch.full(size, 1.0 + index % 7),
            }

    with patch.object(depth_evaluation, "DepthMetrics", Memory):
        evaluate_depth(OneConvolution(), Images(), "nyu", batch_size=4, progress=False)
    slope = mib_per_image(Memory.readings, batch=4)
    kept = size[0] * size[1] * 4 / 2**20
    print(f"evaluation memory over {images} images: {slope:+.4f} MiB per image (keeping the depth: {kept:.2f})")
    return row("depth evaluation memory, MiB per image", abs(slope), "<= 0.1")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a dry run in seconds; its figures say nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size, batch, rounds, images = (TINY, 4, 2, 40) if args.tiny else (FULL, 8, 15, 500)
    cases = {"every pixel measured": 0.0, "30 % holes": 0.3}
    rows = [compare_speed(name, holes, batch, size, rounds) for name, holes in cases.items()]
    rows.append(measure_memory(images, size))
    if not args.tiny:
        write_results("depth_metrics", rows)


if __name__ == "__main__":
    main()

"""mIoU against the formula of evaluate's `mean_iou` beside it, and the memory an evaluation takes per image.

    python benchmarks/segmentation_metrics.py [--tiny]

Prints milliseconds of one CPU per image (medians, interleaved) and MiB per image over 500 images through the Trainer.
`--tiny` runs both on a few images and writes no results.
"""

import argparse
import statistics
import tempfile
import time

import numpy as np
import torch
from timing import mib_per_image, resident_mib, row, write_results
from torch import nn
from transformers import Trainer

from vitweave.training.metrics import ConfusionMatrix, SegmentationMetrics, predicted_classes
from vitweave.training.runs import run_arguments

NUM_LABELS, SIZE, IN_TURN = 150, 512, 5


class PublicMeanIoU:
    """The arithmetic of the Hub's `mean_iou`, step by step: three histograms per image, summed over the images."""

    def __init__(self):
        self.totals = np.zeros((4, NUM_LABELS))

    def update(self, prediction: np.ndarray, label: np.ndarray) -> None:
        prediction, label = np.array(prediction), np.array(label)
        mask = np.not_equal(label, 255)
        prediction, label = prediction[mask], np.array(label)[mask]
        limits = {"bins": NUM_LABELS, "range": (0, NUM_LABELS - 1)}
        hits = np.histogram(prediction[prediction == label], **limits)[0]
        predicted, true = np.histogram(prediction, **limits)[0], np.histogram(label, **limits)[0]
        self.totals += np.stack([hits, predicted + true - hits, predicted, true])

    def compute(self) -> float:
        hits, union, _, _ = self.totals
        with np.errstate(invalid="ignore"):
            return float(np.nanmean(hits / union))


def smooth_maps(count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Class maps of blocks, as real ones are, with errors and ignored pixels."""
    rng = np.random.default_rng(0)
    labels = [np.kron(rng.integers(0, NUM_LABELS, (16, 16)), np.ones((32, 32), dtype=np.int64)) for _ in range(count)]
    predictions = []
    for label in labels:
        wrong = rng.random(label.shape) < 0.3
        predictions.append(np.where(wrong, rng.integers(0, NUM_LABELS, label.shape), label))
        label[rng.random(label.shape) < 0.05] = 255
    return predictions, labels


def timed(update, prediction, label) -> float:
    """Milliseconds of CPU for one image whose maps lie in the cache, as after an argmax."""
    prediction.sum(), label.sum()
    start = time.thread_time()
    update(prediction, label)
    return 1e3 * (time.thread_time() - start)


def compare_speed(rounds: int) -> list[dict]:
    predictions, labels = smooth_maps(IN_TURN * rounds)
    ours, public, times = ConfusionMatrix(NUM_LABELS), PublicMeanIoU(), {"ours": [], "public": []}
    for first in range(0, len(labels), IN_TURN):
        some = range(first, first + IN_TURN)
        maps = [(torch.from_numpy(predictions[i]), torch.from_numpy(labels[i])) for i in some]
        times["ours"] += [timed(ours.update, *pair) for pair in maps]
        times["public"] += [timed(public.update, predictions[i], labels[i]) for i in some]
    fast, slow = statistics.median(times["ours"]), statistics.median(times["public"])
    print(f"{NUM_LABELS} classes, {SIZE} px, ms per image: {fast:.2f}, public formula {slow:.2f}, {slow / fast:.1f}x")
    print(f"mean IoU {ours.compute()['mean_iou']:.12f} and {public.compute():.12f}")
    if abs(ours.compute()["mean_iou"] - public.compute()) > 1e-12:
        raise SystemExit("the two do not agree")
    return [row("mIoU of an image: public formula / ours", slow / fast, ">= 10")]


class Memory(SegmentationMetrics):
    """Notes the resident memory after every batch."""

    def __init__(self):
        super().__init__(num_labels=21)
        self.readings = []

    def __call__(self, prediction, compute_result=True):
        metrics = super().__call__(prediction, compute_result)
        self.readings.append(resident_mib())
        return metrics


class OneConvolution(nn.Module):
    """Logits from one layer: the memory seen is the Trainer's, not the model's."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Conv2d(3, 21, 1)

    def forward(self, pixel_values, labels=None):
        logits = self.classifier(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def measure_memory(images: int) -> list[dict]:
    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return images

        def __getitem__(self, index):
            labels = torch.full((256, 256), index % 21, dtype=torch.int64)
            return {"pixel_values": torch.zeros(3, 256, 256), "labels": labels}

    memory = Memory()
    with tempfile.TemporaryDirectory() as folder:
        options = {"disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
        args = run_arguments(folder, "mean_iou", per_device_eval_batch_size=4, **options)
        Trainer(
            OneConvolution(),
            args,
            eval_dataset=Images(),
            compute_metrics=memory,
            preprocess_logits_for_metrics=predicted_classes,
        ).evaluate()
    slope = mib_per_image(memory.readings, batch=4)
    kept = 21 * 256 * 256 * 4 / 2**20
    print(f"evaluation memory over {images} images: {slope:+.4f} MiB per image (keeping the logits: {kept:.2f})")
    return [row("evaluation memory, MiB per image", abs(slope), "<= 1")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a dry run in seconds; its figures say nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds, images = (1, 20) if args.tiny else (5, 500)
    rows = compare_speed(rounds) + measure_memory(images)
    if not args.tiny:
        write_results("segmentation_metrics", rows)


if __name__ == "__main__":
    main()

"""The streaming mIoU against the formula of evaluate's `mean_iou`, and the memory of a long evaluation.

    python benchmarks/segmentation_metric.py [--rounds 9]

The peer computes four histograms per image in NumPy, as the public metric does. Images have 512 x 512 pixels, 150 classes.
The memory row is the slope of resident memory per image over an evaluation of 500 images by the stock Trainer, in MiB.
"""

import argparse
import resource
import statistics
import tempfile

import numpy as np
import torch
from timing import interleaved, ratio, row, write_results

from vitweave.training.metrics import ConfusionMatrix

CLASSES, SIDE, IGNORE = 150, 512, 255


def histogram_areas(prediction: np.ndarray, label: np.ndarray) -> list[np.ndarray]:
    """Intersection, prediction and label areas per class, and the union, of one image."""
    valid = label != IGNORE
    prediction, label = prediction[valid], label[valid]
    edges = {"bins": CLASSES, "range": (0, CLASSES - 1)}
    areas = [np.histogram(values, **edges)[0] for values in (prediction[prediction == label], prediction, label)]
    return [areas[0], areas[1] + areas[2] - areas[0], areas[1], areas[2]]


def speed(rounds: int) -> list[dict]:
    rng = np.random.default_rng(0)
    predictions = rng.integers(0, CLASSES, (4, SIDE, SIDE))
    labels = np.where(rng.random(predictions.shape) < 0.5, predictions, rng.integers(0, CLASSES, predictions.shape))
    labels[rng.random(labels.shape) < 0.05] = IGNORE
    found = {}

    def ours():
        confusion = ConfusionMatrix(CLASSES, IGNORE)
        for prediction, label in zip(torch_predictions, torch_labels, strict=True):
            confusion.update(prediction, label)
        found["ours"] = confusion.compute()["mean_iou"]

    def peer():
        areas = [histogram_areas(p, t) for p, t in zip(predictions, labels, strict=True)]
        intersection, union = (sum(part) for part in list(zip(*areas, strict=True))[:2])
        found["peer"] = float(np.nanmean(intersection / union))

    torch_predictions, torch_labels = torch.from_numpy(predictions), torch.from_numpy(labels)
    seconds = interleaved({"ours": ours, "peer": peer}, rounds)
    if abs(found["ours"] - found["peer"]) > 1e-12:
        raise SystemExit(f"the two disagree: {found}")
    return [row("mIoU, evaluate's formula / ours", ratio(seconds, "peer", "ours"), ">= 10")]


class Noise(torch.utils.data.Dataset):
    """Images and labels drawn on the fly."""

    def __len__(self) -> int:
        return 500

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        return {
            "pixel_values": torch.randn(3, 128, 128, generator=generator),
            "labels": torch.randint(0, 20, (128, 128), generator=generator),
        }


def memory_slope() -> list[dict]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
    from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
    from vitweave.training.metrics import SegmentationMetrics, predicted_classes

    small = {"model_type": "specialized_vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DensePredictorConfig(backbone_config={**small, "image_size": 128, "patch_size": 16}, num_labels=20)
    used = []

    class Watch(TrainerCallback):
        def on_prediction_step(self, *args, **kwargs):
            with open("/proc/self/statm") as statm:
                used.append(int(statm.read().split()[1]) * resource.getpagesize() / 2**20)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_eval_batch_size=2, batch_eval_metrics=True, report_to=[], use_cpu=True
        )
        Trainer(
            DensePredictorForSemanticSegmentation(config),
            arguments,
            eval_dataset=Noise(),
            compute_metrics=SegmentationMetrics(20),
            preprocess_logits_for_metrics=predicted_classes,
            callbacks=[Watch()],
        ).evaluate()
    later = used[len(used) // 5 :]  # the first fifth fills caches
    slope = statistics.linear_regression(range(len(later)), later).slope / 2
    return [row("evaluation memory, MiB per image", abs(slope), "<= 1")]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    torch.set_num_threads(2)
    write_results("segmentation_metric", speed(parser.parse_args().rounds) + memory_slope())


if __name__ == "__main__":
    main()

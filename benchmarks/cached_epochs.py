"""Epochs of the stock Trainer over a frozen encoder, from images and from cached features; shared by scripts."""

import tempfile
import time
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
from vitweave.training.feature_cache import cache_features
from vitweave.training.runs import build_trainer, run_arguments
from vitweave.training.segmentation_data import SegmentationDataset, collate_segmentation
from vitweave.training.synthetic_shapes import SyntheticShapes

SIZES = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3},
    "base": {"hidden_size": 768, "num_attention_heads": 12},
}
IMAGES = {"tiny": 192, "base": 64}


class MiddleClass(SegmentationDataset):
    """Images labelled with the class of their middle pixel."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        height, width = item["labels"].shape
        return {"pixel_values": item["pixel_values"], "labels": item["labels"][height // 2, width // 2]}


def encoder_config(size: dict, depth: int, pixels: int, **options) -> SpecializedViTConfig:
    return SpecializedViTConfig(**size, num_hidden_layers=depth, image_size=pixels, patch_size=16, **options)


def write_files(folder: Path, number: int, pixels: int) -> None:
    for part in ("image", "label"):
        (folder / part).mkdir(parents=True)
    for index, sample in enumerate(SyntheticShapes(number, size=pixels + 32)):
        sample["image"].save(folder / "image" / f"{index:05}.jpg", quality=90)
        sample["label"].save(folder / "label" / f"{index:05}.png")


def files(folder: str | Path, pixels: int, kind=SegmentationDataset) -> SegmentationDataset:
    return kind.from_folder(folder, SegmentationImageProcessorPil(size=pixels))


class EpochSeconds(TrainerCallback):
    def on_epoch_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self.start


def collate(samples):
    if samples[0]["labels"].ndim:
        return collate_segmentation(samples)
    return {name: torch.stack([sample[name] for sample in samples]) for name in ("pixel_values", "labels")}


def train(model, dataset, cache: str | None = None, epochs: int = 1) -> float:
    """Seconds of one epoch (the last of `epochs`) of the stock Trainer."""
    logging.disable_progress_bar()
    clock = EpochSeconds()
    with tempfile.TemporaryDirectory() as out:
        options = {"save_strategy": "no", "logging_strategy": "no", "use_cpu": True, "disable_tqdm": True}
        args = run_arguments(out, None, num_train_epochs=epochs, **options)
        trainer = build_trainer(model, args, None, dataset, None, collate, callbacks=[clock], cache_features=cache)
        trainer.train()
    return clock.seconds


def speedup(model, dataset, cache: str, rounds: int) -> float:
    """Median of online / cached epoch times, run in turn; three cached epochs, of which the last counts."""
    ratios = []
    cache_features(model, dataset, cache)
    for _ in range(rounds):
        online, cached = train(model, dataset), train(model, dataset, cache, epochs=3)
        ratios.append(online / cached)
        print(f"  epoch of {len(dataset)} images: online {online:.3f} s, cached {cached:.4f} s", flush=True)
    return sorted(ratios)[len(ratios) // 2]

"""Training heads on a frozen encoder: from images against from cached features, through the stock Trainer.

    python benchmarks/feature_cache.py [--rounds N] [--sizes tiny base]
    python benchmarks/feature_cache.py --tiny

224 px, patch 16, batch 16, two threads, JPEG files. Epochs of both kinds run in turn in one process; a build of the
cache runs in turn with a plain forward pass over the same files. Random weights: they cost what trained ones do.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from cached_epochs import IMAGES, SIZES, MiddleClass, collate, encoder_config, files, speedup, write_files
from timing import interleaved, peak_memory, ratio, row, write_results
from torch import nn
from torch.utils.data import DataLoader
from transformers.utils import logging

from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.vision_encoder import VisionEncoder
from vitweave.training.feature_cache import cache_features
from vitweave.training.synthetic_shapes import SyntheticShapes

ROUNDS = {"tiny": 5, "base": 3}
DEMANDS = {"tiny": ">= 20", "base": ">= 50"}
MEMORY = """
import sys
sys.path.insert(0, {here!r})
from cached_epochs import SIZES, files, train
from feature_cache import segmenter
train(segmenter(SIZES[{size!r}], {depth}, {pixels}), files({folder!r}, {pixels}), {cache!r})
"""


class Probe(nn.Module):
    """A linear classifier on the class token and the mean patch of the last layer."""

    accepts_loss_kwargs = False

    def __init__(self, config: SpecializedViTConfig):
        super().__init__()
        self.encoder = VisionEncoder(config, layers=[-1]).requires_grad_(False).eval()
        self.head = nn.Linear(2 * config.hidden_size, 3)

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.eval()
        return self

    def encode(self, pixel_values):
        features = self.encoder(pixel_values)
        return {"pooled": torch.cat([features.cls[0], features.patches[0].mean(dim=1)], dim=1)}

    def forward(self, pixel_values=None, labels=None, encoder_outputs=None):
        if encoder_outputs is None:
            with torch.no_grad():
                encoder_outputs = self.encode(pixel_values)
        logits = self.head(encoder_outputs["pooled"])
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def segmenter(size: dict, depth: int, pixels: int) -> DensePredictorForSemanticSegmentation:
    torch.manual_seed(0)
    backbone = encoder_config(size, depth, pixels, out_indices=[depth])
    config = DensePredictorConfig(backbone_config=backbone, id2label=SyntheticShapes.id2label, freeze_backbone=True)
    return DensePredictorForSemanticSegmentation(config)


def build_cost(model, dataset, folder: Path, rounds: int) -> float:
    """A whole build, keys and all, against decoding and encoding the same files in the same batches."""
    numbers = iter(range(10**6))

    def plain():
        with torch.no_grad():
            for batch in DataLoader(dataset, batch_size=16, collate_fn=collate):
                model.eval().encode(batch["pixel_values"])

    def build():
        cache_features(model, dataset, folder / f"build-{next(numbers)}", batch_size=16)

    return ratio(interleaved({"build": build, "plain": plain}, rounds), "build", "plain")


def measure(name: str, images: int, depth: int, pixels: int, rounds: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        data, cache = Path(folder, "data"), str(Path(folder, "cache"))
        write_files(data, images, pixels)
        model, probe = segmenter(SIZES[name], depth, pixels), Probe(encoder_config(SIZES[name], depth, pixels))
        dataset, labelled = files(data, pixels), files(data, pixels, MiddleClass)
        label = f"ViT-{name}, {images} images"
        rows = [
            row(f"{label}, segmentation epoch, online / cached", speedup(model, dataset, cache, rounds), DEMANDS[name]),
            row(
                f"{label}, linear probe epoch, online / cached", speedup(probe, labelled, cache, rounds), DEMANDS[name]
            ),
            row(f"{label}, build / plain forward pass", build_cost(model, dataset, Path(folder), rounds), "<= 1.15"),
        ]
        code = {"here": str(Path(__file__).parent), "size": name, "depth": depth, "pixels": pixels, "folder": str(data)}
        cached, online = (peak_memory(MEMORY.format(**code, cache=place)) for place in (cache, None))
        return [*rows, row(f"{label}, peak memory, cached / online", cached / online)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="of every size")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--tiny", action="store_true", help="a dry run in seconds; its figures say nothing")
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(2)
    for name in args.sizes:
        if args.tiny:
            print(json.dumps(measure(name, 8, 1, 32, 1), indent=1))
        else:
            write_results(f"feature_cache_{name}", measure(name, IMAGES[name], 12, 224, args.rounds or ROUNDS[name]))


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parents[1]))
    main()

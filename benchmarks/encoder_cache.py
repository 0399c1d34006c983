"""Training projectors on two frozen encoders: from images against from features that were computed once.

    python benchmarks/encoder_cache.py [--rounds 5] [--sizes tiny base]
    python benchmarks/encoder_cache.py --tiny

A ViT with patches of 16 pixels and MobileNetV2 0.35 at 224 px, one projector each (`sequence_concat`), a linear
classifier on the mean token; batch 16, one thread, JPEG files, stock Trainer. Epochs of both kinds run in turn in one
process. Random weights: they cost what trained ones do. The weights after an epoch of either kind are compared.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from cached_epochs import IMAGES, SIZES, MiddleClass, encoder_config, files, speedup, train, write_files
from timing import row, write_results
from transformers import MobileNetV2Config
from transformers.utils import logging

from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.modeling.modeling_multi_encoder import MultiEncoderForImageClassification


def classifier(size: dict, depth: int, pixels: int) -> MultiEncoderForImageClassification:
    torch.manual_seed(0)
    config = MultiEncoderConfig(
        encoder_configs=[encoder_config(size, depth, pixels), MobileNetV2Config(depth_multiplier=0.35)],
        encoder_options=[{"frozen": True}, {"frozen": True}],
        image_size=pixels,
        fusion_type="sequence_concat",
        fusion_options={"order": "append"},
        num_labels=3,
    )
    return MultiEncoderForImageClassification(config)


def largest_difference(models: list[MultiEncoderForImageClassification]) -> float:
    """Between the weights of two models, nothing left out."""
    first, second = (model.state_dict() for model in models)
    return max((first[name].float() - second[name].float()).abs().max().item() for name in first)


def distance_travelled(model: MultiEncoderForImageClassification, start: MultiEncoderForImageClassification) -> float:
    """How far training has moved the projectors, at most."""
    pairs = zip(model.multi_encoder.fusion.parameters(), start.multi_encoder.fusion.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def measure(name: str, images: int, depth: int, pixels: int, rounds: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        data, cache = Path(folder, "data"), str(Path(folder, "cache"))
        write_files(data, images, pixels)
        dataset, label = files(data, pixels, MiddleClass), f"ViT-{name} + MobileNetV2, {images} images"
        models = [classifier(SIZES[name], depth, pixels) for _ in range(2)]
        for model, place in zip(models, (None, cache), strict=True):
            train(model, dataset, place)
        apart = largest_difference(models) / distance_travelled(models[0], classifier(SIZES[name], depth, pixels))
        return [
            row(f"{label}, projector epoch, online / cached", speedup(models[0], dataset, cache, rounds), ">= 10"),
            row(f"{label}, weights apart / moved", apart, "<= 0.0001"),
        ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=["tiny"], choices=list(SIZES))
    parser.add_argument("--tiny", action="store_true", help="a dry run in seconds; its figures say nothing")
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in args.sizes:
        if args.tiny:
            print(json.dumps(measure(name, 48, 1, 32, 1), indent=1))
        else:
            write_results(f"encoder_cache_{name}", measure(name, IMAGES[name], 12, 224, args.rounds))


if __name__ == "__main__":
    main()

"""Training a layer fusion above a frozen encoder: from images against from cached features, through the stock Trainer.

    python benchmarks/fusion_cache.py [--rounds 3] [--fusion concat]
    python benchmarks/fusion_cache.py --tiny

ViT-B/16 at 224 px, layers 3, 6, 9, 12, batch 16, two threads, JPEG files; random weights cost what trained ones do. The
weights after an epoch of either kind are compared bit by bit.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
from cached_epochs import MiddleClass, files, speedup, train, write_files
from timing import row, write_results
from transformers.utils import logging

from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_layer_fusion import LayerFusionForImageClassification

BASE = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "image_size": 224, "patch_size": 16}
TINY = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16}


def classifier(sizes: dict, fusion: str) -> LayerFusionForImageClassification:
    torch.manual_seed(0)
    encoder = SpecializedViTConfig(**sizes)
    model = LayerFusionForImageClassification(
        LayerFusionConfig(encoder_config=encoder, fusion_type=fusion, num_labels=3)
    )
    model.vision_encoder.requires_grad_(False)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fusion", default="concat")
    parser.add_argument("--tiny", action="store_true", help="a dry run in seconds; its figures say nothing")
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(2)
    sizes, images = (TINY, 16) if args.tiny else (BASE, 64)
    with tempfile.TemporaryDirectory() as folder:
        data, cache = Path(folder, "data"), str(Path(folder, "cache"))
        write_files(data, images, sizes["image_size"])
        dataset = files(data, sizes["image_size"], MiddleClass)
        found = speedup(classifier(sizes, args.fusion), dataset, cache, args.rounds)
        online, cached = classifier(sizes, args.fusion), classifier(sizes, args.fusion)
        train(online, dataset)
        train(cached, dataset, cache)
        pairs = zip(online.state_dict().values(), cached.state_dict().values(), strict=True)
        equal = all(torch.equal(one, other) for one, other in pairs)
    label = f"ViT-B, {images} images, {args.fusion}"
    rows = [
        row(f"{label}, epoch online / cached", found, ">= 20"),
        row(f"{label}, weights of both equal (1 = bit by bit)", float(equal), ">= 1"),
    ]
    if not args.tiny:
        write_results(f"fusion_cache_{args.fusion}", rows)
    print(rows)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).parents[1]))
    main()

"""A whole model of two sensors against two passes of transformers' SegFormer, in one interleaved run.

    python benchmarks/modality_models.py [--rounds 3] [--profile] [--tiny]

MiT-B2 with decoders of 768 channels and 40 classes, images of 480 x 640, batch 1, no gradients. "two passes" are two
forwards of `SegformerForSemanticSegmentation`, whose logits stay at a quarter of the size; ours end at the size of the
images, for each sensor and the ensemble, so a row compares with passes that are brought to it, too. On the GPU where
there is one, else one thread. `--tiny` is a trial run that keeps no results.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import forward_only, interleaved, keep_memory, on_device, ratio, row, write_results
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.modeling_modality_fusion import ModalityFusionForSemanticSegmentation

DEVICE = on_device()
B2 = {"hidden_sizes": [64, 128, 320, 512], "depths": [3, 4, 6, 3], "num_attention_heads": [1, 2, 5, 8]}
TINY = {"hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
DEMAND = "<= 1.35"
FUSIONS = ("gemini", "token_exchange", None)


def fused(small: bool, fusion_type: str | None) -> nn.Module:
    torch.manual_seed(0)
    config = ModalityFusionConfig(
        modalities=["rgb", "depth"],
        stream_config=SegformerConfig(**(TINY if small else B2)),
        fusion_type=fusion_type,
        fusion_options={"start": "released"} if fusion_type == "gemini" else {},
        decoder_hidden_size=64 if small else 768,
        num_labels=40,
    )
    return ModalityFusionForSemanticSegmentation(config).eval().to(DEVICE)


def stock(small: bool) -> nn.Module:
    torch.manual_seed(0)
    config = SegformerConfig(**(TINY if small else B2), decoder_hidden_size=64 if small else 768, num_labels=40)
    return SegformerForSemanticSegmentation(config).eval().to(DEVICE)


def two_passes(model: nn.Module, images: Tensor, full_size: bool = False) -> list[Tensor]:
    """The logits of a pass per sensor; images (1, 2, 3, height, width)."""
    logits = [model(part).logits for part in images.unbind(1)]
    return [F.interpolate(part, size=images.shape[-2:], mode="bilinear") for part in logits] if full_size else logits


def operations(function: Callable[[], None]) -> str:
    """Where the time of one run goes."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        function()
    return record.key_averages().table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=40)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="print the costliest operations of both")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    images = torch.randn(1, 2, 3, *((64, 96) if args.tiny else (480, 640)), device=DEVICE)
    peer = stock(args.tiny)
    variants = {str(name): forward_only(fused(args.tiny, name), images) for name in FUSIONS}
    variants["two passes"] = forward_only(lambda images: two_passes(peer, images), images)
    variants["at full size"] = forward_only(lambda images: two_passes(peer, images, full_size=True), images)
    if args.profile:
        for name in ("gemini", "two passes"):
            print(name, operations(variants[name]), sep="\n")
    seconds = interleaved(variants, 1 if args.tiny else args.rounds)
    fastest = {f"{name}_ms": round(min(times) * 1000, 1) for name, times in seconds.items()}
    print("   ".join(f"{name} {ms}" for name, ms in fastest.items()))
    rows = []
    for name in map(str, FUSIONS):
        what = f"MiT-B2, {'no fusion' if name == 'None' else name}: a sensor / "
        demand = DEMAND if name == "gemini" else ""
        rows.append(row(f"{what}a SegFormer pass", ratio(seconds, name, "two passes"), demand) | fastest)
        rows.append(row(f"{what}a pass at full size", ratio(seconds, name, "at full size")))
    if args.tiny:
        print(*rows, sep="\n")
    else:
        write_results("modality_models", rows, DEVICE)


if __name__ == "__main__":
    main()

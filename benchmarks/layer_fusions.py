"""Cost of every layer fusion against the forward of the encoder it stands on, in one interleaved run.

    python benchmarks/layer_fusions.py [--rounds 9] [--batch 8] [--tiny]

ViT-B/16 at 224 px, layers 3, 6, 9, 12, inference, two threads. "formula" is the multiply-adds per image by the formula
of the method, "counted" what PyTorch counts. `--tiny` is a trial run that keeps no results.
"""

import argparse

import torch
from timing import forward_only, interleaved, ratio, row, write_results
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig

from vitweave.modeling.layer_fusion.base import LayerFusion, LayerTokens
from vitweave.modeling.layer_fusion.registry import LAYER_FUSIONS, build_layer_fusion
from vitweave.modeling.vision_encoder import VisionEncoder

TINY = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 64}
VARIANTS = {
    "concat": [{"dense": True}],
    "cross_layer_attention": [{"folded": False}],
    "efficient_attention": [{"attention": "linear"}],
    "fpn": [{"style": "last"}, {"style": "dpt"}],
    "graph": [{"conv": "gatv2"}],
    "weighted_sum": [{"dense": True}],
}


def formulas(c: int, n: int, layers: int) -> dict[str, float]:
    """Multiply-adds per image of the variants whose cost has a formula: c hidden size, n patches."""
    heads, hidden = max(1, c // 64), c // 4
    k, reduced, mid, out, cell = c // 32, 256, 128, 256, 256
    return {
        "aspp": n * (layers * c * reduced + reduced * mid * (1 + 9 * 3) + 5 * mid * c) + reduced * mid + c * c,
        "attentive_probe": 2 * layers * 4 * c * c + 4 * c * c,
        "concat": layers * c * c,
        "concat dense=True": (n + 1) * layers * c * c,
        "cross_layer_attention": 2 * layers * n * c * heads + 4 * c * c + 8 * c * c,
        "cross_layer_attention folded=False": 2 * layers * n * c * c + 2 * c * c + 8 * c * c,
        "efficient_attention": n * c * (9 * k + 2 + layers) + c * c,
        "film": c * hidden + hidden * 2 * layers * c + c * c + layers * n * c,
        "fpn": 5.25 * n * (c * out + 9 * out**2) + n * 4 * c * c + 3 * out * c,
        "gated_sum": layers * c * hidden,
        "graph": layers * c * c + layers**2 * c + c * c,
        "graph conv=gatv2": (2 * layers + 1) * c * c,
        "layer_self_attention": (layers + 1) * 12 * c * c,
        "recurrent": layers * 3 * (c * cell + cell**2) + cell * c,
        "weighted_sum": layers * c,
        "weighted_sum dense=True": layers * c * (n + 1),
    }


def random_tokens(batch: int, layers: int, hidden: int, grid: tuple[int, int]) -> LayerTokens:
    patches = grid[0] * grid[1]
    return LayerTokens(
        cls=torch.randn(batch, layers, hidden),
        patches=torch.randn(batch, layers, patches, hidden),
        grid=grid,
        base_cls=torch.randn(batch, hidden),
        base_patches=torch.randn(batch, patches, hidden),
    )


def counted(fusion: LayerFusion, tokens: LayerTokens) -> int:
    """Multiply-adds per image, by the counter of PyTorch."""
    with FlopCounterMode(display=False) as counter:
        fusion(tokens)
    return counter.get_total_flops() // 2 // len(tokens.base_cls)


def demand(name: str, fusion: LayerFusion) -> str:
    """At most 3 % of the encoder's forward for what reads only [CLS] tokens, and for folded attention."""
    return "<= 0.03" if fusion.needs == {"cls"} or name == "cross_layer_attention" else ""


def measure(config: ViTConfig, batch: int, rounds: int) -> list[dict]:
    torch.manual_seed(0)
    layers = [round(k * config.num_hidden_layers / 4) for k in (1, 2, 3, 4)]
    encoder = VisionEncoder(config, layers=layers, final_norm=False).eval()
    side, hidden = config.image_size // config.patch_size, config.hidden_size
    tokens = random_tokens(batch, len(layers), hidden, (side, side))
    fusions = {
        " ".join([name, *(f"{key}={value}" for key, value in options.items())]): build_layer_fusion(
            name, len(layers), hidden, options
        ).eval()
        for name in LAYER_FUSIONS
        for options in [{}, *VARIANTS.get(name, [])]
    }
    pixels = torch.randn(batch, 3, config.image_size, config.image_size)
    runs = {"encoder": forward_only(encoder, pixels)} | {name: forward_only(f, tokens) for name, f in fusions.items()}
    seconds = interleaved(runs, rounds)
    expected, rows = formulas(hidden, side * side, len(layers)), []
    print(f"{'fusion':36} {'parameters':>12} {'counted':>16} {'formula':>16} {'ms/image':>9}")
    for name, fusion in fusions.items():
        parameters = sum(parameter.numel() for parameter in fusion.parameters())
        macs, formula = counted(fusion, tokens), expected.get(name)
        milliseconds = 1000 * sorted(seconds[name])[rounds // 2] / batch
        told = "" if formula is None else f"{formula:,.0f}"
        print(f"{name:36} {parameters:12,} {macs:16,} {told:>16} {milliseconds:9.3f}")
        cost = {"parameters": parameters, "macs": macs, "formula": formula}
        rows.append(row(f"{name} / encoder", ratio(seconds, name, "encoder"), demand(name, fusion)) | cost)
    naive, folded = "cross_layer_attention folded=False", "cross_layer_attention"
    rows.append(row(f"{naive} / {folded}", ratio(seconds, naive, folded), ">= 5"))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.tiny:
        measure(ViTConfig(**TINY), batch=2, rounds=1)
    else:
        write_results("layer_fusions", measure(ViTConfig(), args.batch, args.rounds))


if __name__ == "__main__":
    main()

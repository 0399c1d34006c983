"""Encoder fusions against their formulas written down one after the other, in one interleaved run.

    python benchmarks/encoder_fusions.py [--rounds 5] [--only NAME] [--tiny]

Widths and token counts are those of the presets, one image. Three ways to run each: forward without gradients, forward
and backward with frozen encoders (gradients of the fusion's weights only, where it has some), and with trained ones (of
the maps, too). "memory" is the peak of what is allocated beside the maps and weights. On the GPU where there is one,
else one thread. `--tiny` is a trial run that keeps no results.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timing import (
    forward_only,
    interleaved,
    keep_memory,
    on_device,
    peak_allocated,
    ratio,
    row,
    synchronize,
    write_results,
)
from torch import Tensor, nn

from vitweave.modeling.encoder_fusion.base import EncoderMaps
from vitweave.modeling.encoder_fusion.mixture_of_resolution import MixtureOfResolutionAdapter
from vitweave.modeling.encoder_fusion.registry import build_encoder_fusion
from vitweave.modeling.grid_matching import map_to_tokens, tokens_to_map

DEVICE = on_device()
MIB = 2**20


@dataclass
class Case:
    """One fusion at one size.

    Args:
        module: holds the weights of both forms.
        ours: maps to the output.
        plain: the same by the formulas.
        maps: (1, channels, height, width) of every encoder.
        memory: demand on the ratio of the memory.
        most_rounds: for forms so far apart that a few rounds tell.
    """

    module: nn.Module
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    maps: list[Tensor]
    memory: str = ""
    most_rounds: int = 99


# Patch info mining ---------------------------------------------------------------------------------------------------


def mining_case(side: int, window: int, channels: int, detail_channels: int) -> Case:
    grids = [(side, side), (side * window, side * window)]
    fusion = build_encoder_fusion("patch_info_mining", [channels, detail_channels], grids).to(DEVICE)
    maps = [vit_map(channels, grids[0]), random(1, detail_channels, *grids[1])]

    def plain(queries: Tensor, detail: Tensor) -> Tensor:
        """Windows unfolded, normed and projected one by one, the query repeated for each cell."""
        tokens = map_to_tokens(queries)
        cells = F.unfold(detail, window, stride=window).unflatten(1, (-1, window**2)).permute(0, 3, 2, 1)
        query = fusion.q_proj(fusion.q_norm(tokens))[:, :, None].repeat(1, 1, window**2, 1)
        keys, values = fusion.k_proj(fusion.k_norm(cells)), fusion.v_proj(fusion.v_norm(cells))
        weights = ((query * keys).sum(dim=3) / channels**0.5).nan_to_num().softmax(dim=2)
        return tokens + (weights[..., None] * values).sum(dim=2)

    return Case(fusion, lambda *maps: fusion(EncoderMaps(list(maps))), plain, maps, memory="<= 0.6", most_rounds=1)


# MR-Adapter ----------------------------------------------------------------------------------------------------------


def adapter_case(fast_side: int, slow_side: int, fast_channels: int, slow_channels: int) -> Case:
    adapter = MixtureOfResolutionAdapter(fast_channels, slow_channels).to(DEVICE)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.02)  # nothing is zero
    maps = [vit_map(fast_channels, (fast_side,) * 2), random(1, slow_channels, slow_side, slow_side)]

    def plain(fast: Tensor, slow: Tensor) -> Tensor:
        updated = fast + adapter.fast_proj(F.gelu(adapter.fast_conv(fast)))
        detail = adapter.slow_proj(F.gelu(adapter.slow_conv(slow)))
        if slow_side < fast_side:
            detail = F.interpolate(detail, size=(fast_side, fast_side), mode="bilinear", align_corners=True)
        means = torch.cat([updated, detail], dim=1).mean(dim=(2, 3))
        return updated + adapter.gate(means).tanh()[:, :, None, None] * detail

    return Case(adapter, adapter, plain, maps)


# Spatial vision aggregator -------------------------------------------------------------------------------------------


def aggregator_case(side: int, fine_side: int, channels: tuple[int, ...], width: int) -> Case:
    grids = [(side, side)] * (len(channels) - 1) + [(fine_side, fine_side)]
    options = {"vision_hidden_size": width}
    fusion = build_encoder_fusion("spatial_vision_aggregator", list(channels), grids, options=options).to(DEVICE)
    *vit_channels, conv_channels = channels
    maps = [*(vit_map(c, grids[0]) for c in vit_channels), random(1, conv_channels, *grids[-1])]

    def plain(*maps: Tensor) -> Tensor:
        """Every position an element of the batch, with queries and context repeated for all of them."""
        states = [project(map_to_tokens(part)) for project, part in zip(fusion.projections, maps, strict=True)]
        context = states[0].mean(dim=1, keepdim=True).expand(-1, side**2, -1).flatten(0, 1)[:, None]
        query = fusion.query.expand(side**2, -1)[:, None]
        windows = []
        for part, grid in zip(states, grids, strict=True):
            cells = part.view(side, grid[0] // side, side, grid[1] // side, width)
            windows.append(cells.permute(0, 2, 1, 3, 4).reshape(side**2, -1, width))
        for layer in fusion.samplers[0].layers:
            query = plain_layer(layer, query, context, windows)
        return query[:, 0][None]

    return Case(fusion, lambda *maps: fusion(EncoderMaps(list(maps))), plain, maps, memory="<= 1.0", most_rounds=3)


def plain_layer(layer: nn.Module, query: Tensor, context: Tensor, windows: list[Tensor]) -> Tensor:
    """Keys and values of every cell, then attention of one query (positions, 1, hidden) per position."""
    attention, heads = layer.attention, layer.attention.num_heads
    x = layer.proj_in(torch.cat([query, layer.proj_context(context)], dim=2))
    places = [getattr(layer, f"pos_embed_{index}") for index in range(len(windows))]
    cells = [part if place is None else part + place for part, place in zip(windows, places, strict=True)]
    pairs = list(zip(attention.readers, cells, strict=True))
    keys = torch.cat([reader.k_proj(reader.k_norm(part)) for reader, part in pairs], dim=1)
    values = torch.cat([reader.v_proj(reader.v_norm(part)) for reader, part in pairs], dim=1)
    q, k, v = (
        part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (attention.q_proj(attention.q_norm(x)), keys, values)
    )
    found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return query + layer.proj_out(layer.norm(x + attention.o_proj(found)))


# Channel concatenation -----------------------------------------------------------------------------------------------


def concat_case(side: int, sides: tuple[int, ...], channels: tuple[int, ...]) -> Case:
    """Maps of `sides` on the grid of `side`, the first one a ViT's."""
    grids = [(each, each) for each in sides]
    fusion = build_encoder_fusion("channel_concat", list(channels), grids, options={"grid": side}).to(DEVICE)
    maps = [vit_map(channels[0], grids[0])]
    maps += [random(1, width, *grid) for width, grid in zip(channels[1:], grids[1:], strict=True)]

    def plain(*maps: Tensor) -> Tensor:
        """Every map resized, then one map of all channels as tokens."""
        resized = [F.interpolate(part, size=(side, side), mode="bilinear", align_corners=True) for part in maps]
        return map_to_tokens(torch.cat(resized, dim=1)).contiguous()

    return Case(fusion, lambda *maps: fusion(EncoderMaps(list(maps))), plain, maps)


# name -> function that builds the case, its arguments at the preset's size, and those of a trial run
CASES: dict[str, tuple[Callable[..., Case], tuple, tuple]] = {
    "patch_info_mining mgm": (mining_case, (24, 8, 1024, 2880), (4, 2, 32, 48)),
    "mr_adapter llava-hr 384": (adapter_case, (24, 12, 1024, 1536), (4, 2, 32, 48)),
    "mr_adapter llava-hr 1024": (adapter_case, (32, 32, 1024, 1536), (4, 4, 32, 48)),
    "mr_adapter llava-hr-x 1024": (adapter_case, (32, 32, 1024, 3072), (4, 4, 32, 96)),
    "spatial_vision_aggregator": (
        aggregator_case,
        (24, 96, (1152, 1024, 1536, 5760), 1024),  # Cambrian-1 8B
        (4, 16, (32, 32, 48, 64), 32),
    ),
    "channel_concat eagle-x5": (
        concat_case,
        (32, (24, 32, 32, 64, 45), (1024, 3072, 1024, 1024, 1536)),
        (4, (4, 4, 8), (32, 48, 32)),
    ),
}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def vit_map(channels: int, grid: tuple[int, int]) -> Tensor:
    """A map as a ViT gives it, a view of its tokens."""
    return tokens_to_map(random(1, grid[0] * grid[1], channels), grid)


def with_backward(function: Callable[..., Tensor], module: nn.Module, maps: list[Tensor]) -> Callable[[], None]:
    def run():
        output = function(*maps)
        output.backward(torch.ones_like(output))
        for tensor in [*maps, *module.parameters()]:
            tensor.grad = None
        synchronize()

    return run


def ways_to_run(case: Case) -> dict[str, dict[str, Callable[[], None]]]:
    """Way -> ours and plain."""
    forms = {"ours": case.ours, "plain": case.plain}
    trained = [part.clone().requires_grad_() for part in case.maps]
    ways = {"forward": {form: forward_only(function, *case.maps) for form, function in forms.items()}}
    if any(True for _ in case.module.parameters()):
        ways["+ backward, frozen"] = {form: with_backward(f, case.module, case.maps) for form, f in forms.items()}
    ways["+ backward, trained"] = {form: with_backward(f, case.module, trained) for form, f in forms.items()}
    return ways


def measure(name: str, case: Case, rounds: int) -> list[dict]:
    """Rows of time and memory; the two forms must agree."""
    with torch.no_grad():
        torch.testing.assert_close(case.ours(*case.maps), case.plain(*case.maps), rtol=1e-4, atol=1e-5)
    rows = []
    for way, runs in ways_to_run(case).items():
        peaks = {form: peak_allocated(run) for form, run in runs.items()}  # which warms them up, too
        seconds = interleaved(runs, min(rounds, case.most_rounds), warm=True)
        facts = {form: (min(seconds[form]) * 1000, peaks[form] / MIB) for form in runs}
        told = [f"{form} {ms:8.1f} ms {mib:8.1f} MiB" for form, (ms, mib) in facts.items()]
        print(f"{name:28} {way:20} " + "   ".join(told), flush=True)
        absolute = {
            f"{form}_{unit}": v for form, pair in facts.items() for unit, v in zip(("ms", "mib"), pair, strict=True)
        }
        rows.append(row(f"{name} {way}: time", ratio(seconds, "ours", "plain"), "<= 1.02") | absolute)
        rows.append(row(f"{name} {way}: memory", peaks["ours"] / peaks["plain"], case.memory))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    rows = []
    for name, (build, sizes, tiny_sizes) in CASES.items():
        if args.only in name:
            torch.manual_seed(0)
            rows += measure(name, build(*(tiny_sizes if args.tiny else sizes)), 1 if args.tiny else args.rounds)
    if not args.tiny and not args.only:
        write_results("encoder_fusions", rows, DEVICE)


if __name__ == "__main__":
    main()

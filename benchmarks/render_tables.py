"""The measured tables and figures of README and the documentation, from `results/*.json`.

    python benchmarks/render_tables.py [--check]

What stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` is what `LISTS`, `GRIDS` and `FIGURES` make of the
results; `--check` writes nothing, and has the exit status 1 where a page tells something else.
"""

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RESULTS = Path(__file__).parent / "results"
MARKED = re.compile(r"<!-- bench:(\w+) -->(.*?)<!-- /bench:\1 -->", re.DOTALL)
SIGNS = {"<=": "≤", ">=": "≥"}

# name -> files under one another
LISTS = {
    "costs": ("specialized_vit_small", "specialized_vit_base", "early_stop", "segmentation_metrics", "import_time"),
}
# name -> head of the first column, the other columns with their files, rows with the end of their `what` in each file
GRIDS = {
    "caches": (
        "ratio, side by side in one run (`python benchmarks/feature_cache.py`)",
        {"ViT-Ti": "feature_cache_tiny", "ViT-B": "feature_cache_base"},
        {
            "epoch of a linear segmentation head, online / cached": "segmentation epoch, online / cached",
            "epoch of a linear probe, online / cached": "linear probe epoch, online / cached",
            "building the cache / one plain forward pass": "build / plain forward pass",
        },
    ),
}
# name -> text, and the file and row of every figure in it
FIGURES = {
    "specialised_sizes": (
        "forward {:.2f}x for ViT-S and {:.2f}x for ViT-B, forward and backward {:.2f}x and {:.2f}x",
        ("specialized_vit_small", "ViT-small forward / transformers"),
        ("specialized_vit_base", "ViT-base forward / transformers"),
        ("specialized_vit_small", "ViT-small forward + backward / transformers"),
        ("specialized_vit_base", "ViT-base forward + backward / transformers"),
    ),
    "stopping": ("takes {:.2f} of a full forward", ("early_stop", "backbone, layer 3 of 12 / own full forward")),
    "mean_iou": ("{:.0f}x faster", ("segmentation_metrics", "mIoU of an image: public formula / ours")),
    "building": (
        "{:.2f} and {:.2f} of one plain forward pass",
        ("feature_cache_tiny", "ViT-tiny, 192 images, build / plain forward pass"),
        ("feature_cache_base", "ViT-base, 64 images, build / plain forward pass"),
    ),
    "plain_formulas": (
        "`patch_info_mining` {:.2f} of the time and {:.2f} of the memory of a forward, `spatial_vision_aggregator`"
        " {:.2f} of the time, `channel_concat` {:.2f}",
        ("encoder_fusions", "patch_info_mining mgm forward: time"),
        ("encoder_fusions", "patch_info_mining mgm forward: memory"),
        ("encoder_fusions", "spatial_vision_aggregator forward: time"),
        ("encoder_fusions", "channel_concat eagle-x5 forward: time"),
    ),
    "gemini_cost": (
        "{:.2f} of the values for the backward pass that its equations, written down, keep; its forward takes {:.2f} of"
        " their time at 64 channels, {:.2f} at 512",
        ("modality_fusions", "gemini 512 channels: saved"),
        ("modality_fusions", "gemini 64 channels forward: time"),
        ("modality_fusions", "gemini 512 channels forward: time"),
    ),
    "cross_attention": (
        "takes {:.0f} times as long as `gemini`, with fused kernels {:.0f} times",
        ("modality_fusions", "4096 tokens, 64 channels: cross-attention as written / gemini"),
        ("modality_fusions", "4096 tokens, 64 channels: cross-attention fused / gemini"),
    ),
    "sensor_passes": (
        "takes {:.2f} of two passes of transformers' SegFormer with `gemini`, {:.2f} without a fusion",
        ("modality_models", "MiT-B2, gemini: a sensor / a SegFormer pass"),
        ("modality_models", "MiT-B2, no fusion: a sensor / a SegFormer pass"),
    ),
    "epoch_times": (
        "is {:.0f} times faster",
        ("fusion_cache_concat", "ViT-B, 64 images, concat, epoch online / cached"),
    ),
    "cls_cost": ("at most {:.1%}", ("layer_fusions", "<= 0.03")),
    "projector_epoch": (
        "{:.0f} times",
        ("encoder_cache_tiny", "ViT-tiny + MobileNetV2, 192 images, projector epoch, online / cached"),
    ),
    "metric_times": (
        "{:.1f} to {:.1f} times less time",
        ("depth_metrics", "depth metrics of an image, every pixel measured: published loop / ours"),
        ("depth_metrics", "depth metrics of an image, 30 % holes: published loop / ours"),
    ),
    "specialised": (
        "ViT-S against transformers: forward {:.2f}x, training step {:.2f}x",
        ("specialized_vit_small", "ViT-small forward / transformers"),
        ("specialized_vit_small", "ViT-small forward + backward / transformers"),
    ),
    "early_stop": (
        "layer 3 of 12: {:.2f} of a full forward",
        ("early_stop", "backbone, layer 3 of 12 / own full forward"),
    ),
    "cached_epochs": (
        "epoch from the cache: ViT-Ti {:.0f}x (segmentation), {:.0f}x (linear probe); ViT-B {:.0f}x, {:.0f}x",
        ("feature_cache_tiny", "ViT-tiny, 192 images, segmentation epoch, online / cached"),
        ("feature_cache_tiny", "ViT-tiny, 192 images, linear probe epoch, online / cached"),
        ("feature_cache_base", "ViT-base, 64 images, segmentation epoch, online / cached"),
        ("feature_cache_base", "ViT-base, 64 images, linear probe epoch, online / cached"),
    ),
    "cls_fusions": (
        "at most {:.1%} of ViT-B where [CLS] alone is fused, or attention is folded",
        ("layer_fusions", "<= 0.03"),
    ),
    "fusion_epoch": (
        "trained on cached features {:.0f}x faster",
        ("fusion_cache_concat", "ViT-B, 64 images, concat, epoch online / cached"),
    ),
    "folded": (
        "folded, one query costs 1/{:.0f}",
        ("layer_fusions", "cross_layer_attention folded=False / cross_layer_attention"),
    ),
    "patch_mining": (
        "patch mining in {:.2f} of the memory of unfolding",
        ("encoder_fusions", "patch_info_mining mgm forward: memory"),
    ),
    "two_sensors": (
        "MiT-B2 of two sensors with `gemini`: {:.2f} of two SegFormer passes",
        ("modality_models", "MiT-B2, gemini: a sensor / a SegFormer pass"),
    ),
    "depth_metrics": (
        "{:.1f} to {:.1f} times faster than the usual NumPy loop",
        ("depth_metrics", "depth metrics of an image, every pixel measured: published loop / ours"),
        ("depth_metrics", "depth metrics of an image, 30 % holes: published loop / ours"),
    ),
}


def report_of(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def value_of(name: str, what: str) -> float:
    """A row's ratio; for a demand as `what`, the largest one of those under it."""
    rows = report_of(name)["rows"]
    return max(row["ratio"] for row in rows if what in (row["what"], row["demand"]))


def cell(row: dict, digits: int | None = None) -> str:
    """A ratio and its aim; the digits follow its size unless they are given."""
    value = row["ratio"]
    digits = (0 if value >= 1000 else 1 if value >= 10 else 2) if digits is None else digits
    sign, _, limit = row["demand"].partition(" ")
    return f"{value:.{digits}f}" + (f" (aim {SIGNS[sign]} {limit})" if sign else "")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def under(names: list[str]) -> str:
    """What the figures were measured with: once, where all files say the same."""
    told = {}
    for name in names:
        report = report_of(name)
        versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
        threads = f"{report['threads']} thread{'s' if report['threads'] > 1 else ''}"
        told.setdefault(f"{report['device']}, {threads}; {versions}", []).append(f"`{name}`")
    texts = list(told) if len(told) == 1 else [f"{text} ({', '.join(files)})" for text, files in told.items()]
    return "\n" + ".\n".join(texts) + ".\n\n"


def listed(name: str) -> str:
    files = list(LISTS[name])
    rows = [[row["what"], cell(row, digits=3)] for file in files for row in report_of(file)["rows"]]
    return markdown(["ratio, side by side in one run", "value"], rows) + under(files)


def grid(name: str) -> str:
    head, columns, wanted = GRIDS[name]
    rows = [[told, *(cell(ending(file, what)) for file in columns.values())] for told, what in wanted.items()]
    return markdown([head, *columns], rows) + under(list(columns.values()))


def ending(name: str, what: str) -> dict:
    """The row that ends so."""
    return next(row for row in report_of(name)["rows"] if row["what"].endswith(what))


def figures(name: str) -> str:
    text, *sources = FIGURES[name]
    return text.format(*(value_of(*source) for source in sources))


def rendered(name: str) -> str:
    for known, maker in ((LISTS, listed), (GRIDS, grid), (FIGURES, figures)):
        if name in known:
            return maker(name)
    raise ValueError(f"unknown table {name!r}; known: {sorted([*LISTS, *GRIDS, *FIGURES])}")


def render(text: str) -> str:
    """`text` with everything between markers written anew."""

    def fresh(match: re.Match) -> str:
        name = match[1]
        return f"<!-- bench:{name} -->{rendered(name)}<!-- /bench:{name} -->"

    return MARKED.sub(fresh, text)


def render_pages(write: bool = True) -> list[str]:
    """The names of the pages that told something else."""
    changed = []
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = render(old)
        if new != old:
            changed.append(page.name)
            if write:
                page.write_text(new, encoding="utf-8")
    return changed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args()
    changed = render_pages(write=not args.check)
    print(*changed, sep="\n")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    raise SystemExit(main())

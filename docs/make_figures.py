"""Draw every picture of the documentation.    python docs/make_figures.py [NAME ...]

Diagrams show mechanisms; bars show `benchmarks/results/*.json` and `model_cards/*.md`; the rest is measured on
`examples/data` by a small model that is trained here, in some minutes on one CPU core. Needs the extra `viz`.
"""

import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import diagrams
import matplotlib
import numpy as np
import PIL.Image
import torch
from diagrams import BLUE, GREEN, IMAGES, INK, ORANGE, PAPER, PINK, ROOT, STRONG, Sheet, save
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from transformers import set_seed

from vitweave.analysis.report import InspectOptions, inspect_model
from vitweave.analysis.similarity import unit
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.modeling_layer_fusion import LayerFusionBackbone
from vitweave.modeling.modeling_specialized_vit import SpecializedViTModel
from vitweave.modeling.vision_encoder import VisionEncoder
from vitweave.processing.augmentation import SegmentationAugmentation
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
from vitweave.processing.tiling import choose_grid, tile_boxes
from vitweave.training.segmentation import train_segmentation
from vitweave.training.segmentation_data import FolderSamples, SegmentationDataset

matplotlib.use("Agg")

# Bars of what was measured ---------------------------------------------------------------------------------------


def bars(name: str, groups: list[tuple[str, list[tuple]]], label: str, log: bool = False):
    """Horizontal bars (what, value, aim or None); the aim is a mark that the bar must reach or stay below."""
    count = sum(len(rows) for _, rows in groups)
    figure = Figure(figsize=(7, 0.75 + 0.27 * count + 0.34 * len(groups)), facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot(facecolor=PAPER)
    widest = max(value for _, rows in groups for _, value, _ in rows)
    place, ticks, names = 0.0, [], []
    for (title, rows), colour in zip(groups, (BLUE, ORANGE, GREEN, PINK), strict=False):
        axes.text(
            0.0, place - 0.1, title, transform=axes.get_yaxis_transform(), fontsize=9.5, fontweight="bold", color=INK
        )
        place += 0.8
        for what, value, aim in rows:
            axes.barh(place, value, color=STRONG[colour], height=0.62, alpha=0.85)
            shown = f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
            crossed = aim is not None and value < aim < value + 0.15 * widest and not log
            axes.annotate(
                shown,
                (aim if crossed else value, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=INK,
            )
            if aim is not None:
                axes.plot([aim, aim], [place - 0.4, place + 0.4], color=INK, lw=1.6)
            ticks.append(place)
            names.append(what)
            place += 1
        place += 0.45
    axes.set_yticks(ticks, names, fontsize=9)
    axes.set_ylim(place - 0.6, -0.7)
    axes.set_xscale("log" if log else "linear")
    axes.margins(x=0.12)
    axes.set_xlabel(label, fontsize=9, color=INK)
    axes.tick_params(colors=INK, labelsize=8.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    save(figure, name)


def rows_of(name: str) -> dict[str, dict]:
    """The rows of a benchmark's result by what they measure."""
    stored = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return {row["what"]: row for row in stored["rows"]}


def aim_of(row: dict) -> float | None:
    """The number behind "<= 1.02"."""
    return float(row["demand"].split()[-1]) if row["demand"] else None


def card_metrics(card: str) -> dict[str, float]:
    """Name -> value of every metric in a card's front matter."""
    front = (ROOT / "model_cards" / f"{card}.md").read_text().split("\n---\n")[0]
    found = re.findall(r"value: (\S+)\n\s+name: (?:'([^']*)'|(.*))", front)
    return {quoted or plain: float(value) for value, quoted, plain in found}


def draw_cost_specialized():
    groups = []
    for size in ("small", "base"):
        rows = rows_of(f"specialized_vit_{size}")
        named = {
            what.removeprefix(f"ViT-{size} "): row for what, row in rows.items() if what.endswith("/ transformers")
        }
        groups.append(
            (f"ViT-{size}", [(n.removesuffix(" / transformers"), r["ratio"], aim_of(r)) for n, r in named.items()])
        )
    bars("cost_specialized", groups, "specialised / transformers' vanilla ViT, time or memory; the mark is the aim")


def draw_cost_layer_fusions():
    rows = {w.removesuffix(" / encoder"): r for w, r in rows_of("layer_fusions").items() if w.endswith("/ encoder")}
    plain = sorted(((n, 100 * r["ratio"], None) for n, r in rows.items() if " " not in n), key=lambda row: row[1])
    bars(
        "cost_layer_fusions",
        [("default options", plain)],
        "time of the fusion, % of a ViT-B forward, batch 8",
        log=True,
    )


def draw_cost_feature_cache():
    groups = []
    for size in ("tiny", "base"):
        rows = {what.split(", ", 2)[2]: row for what, row in rows_of(f"feature_cache_{size}").items()}
        shown = [
            (w.removesuffix(", online / cached"), r["ratio"], aim_of(r)) for w, r in rows.items() if "online / c" in w
        ]
        groups.append((f"ViT-{size}", [row for row in shown if "memory" not in row[0]]))
    concat = rows_of("fusion_cache_concat")["ViT-B, 64 images, concat, epoch online / cached"]
    groups[1][1].append(("layer fusion (concat) epoch", concat["ratio"], aim_of(concat)))
    bars("cost_feature_cache", groups, "times faster from the cache; the mark is the aim", log=True)


def draw_cost_encoder_fusions():
    groups = {"patch_info_mining": [], "mr_adapter": [], "spatial_vision_aggregator": [], "channel_concat": []}
    for what, row in rows_of("encoder_fusions").items():
        if what.endswith(": time"):
            name, rest = what.removesuffix(": time").split(" ", 1)
            groups[name].append((rest.removeprefix("+ "), row["ratio"], aim_of(row)))
    bars("cost_encoder_fusions", list(groups.items()), "time / the plain formula; the mark is the aim")


def draw_cost_modality_fusions():
    rows = rows_of("modality_fusions")
    groups = [
        (title, [(w.split()[1] + " channels", r["ratio"], aim_of(r)) for w, r in rows.items() if w.endswith(ending)])
        for title, ending in (
            ("gemini, forward time", "channels forward: time"),
            ("forward and backward time", "+ backward: time"),
            ("values kept for backward", ": saved"),
        )
    ]
    bars("cost_modality_fusions", groups, "ours / the equations as they are written; the mark is the aim")


def draw_depth_layers():
    card = card_metrics("vit_tiny_nyudv2_depth")
    rows = [
        ("linear, last layer", card["AbsRel, linear, layer 12 alone, protocol nyu"], None),
        ("linear, four layers", card["AbsRel, linear, layers 3 6 9 12, protocol nyu"], None),
        ("DPT, four layers", card["AbsRel, DPT, layers 3 6 9 12, protocol nyu"], None),
        (
            "four layers, [CLS] LoRA, half the steps",
            card["AbsRel, linear, layers 3 6 9 12, LoRA on [CLS], 300 steps, protocol nyu"],
            None,
        ),
    ]
    bars("depth_layers", [("NYU v2 at 256 x 192, ViT-Ti", rows)], "AbsRel on the test part, lower is better")


def draw_two_encoders():
    card = card_metrics("clothing10_two_encoders")
    rows = [(name.removesuffix(", mean of three seeds"), 100 * value, None) for name, value in card.items()]
    alone = [row for row in rows if row[0].endswith("alone")]
    fused = [row for row in rows if not row[0].endswith("alone")]
    bars(
        "two_encoders",
        [("one encoder", alone), ("both", fused)],
        "accuracy in per cent on 250 pictures; intervals: card",
    )


# Measured on the shipped pictures --------------------------------------------------------------------------------


CELLS = ROOT / "examples" / "data" / "cells"
BLOCKS = 6
TEMPERATURE = 0.1  # of the fused weights, which move ten times as fast as at 1


def train_on_cells(folder: Path, steps: int = 400):
    """A small specialised ViT from scratch, whose six layers a dense weighted sum fuses below a linear head."""
    set_seed(0)
    config = SpecializedViTConfig(
        hidden_size=64, num_hidden_layers=BLOCKS, num_attention_heads=4, patch_size=4, image_size=64,
        position_embedding_type="rotary",
    )  # fmt: skip
    options = {"dense": True, "direct": True, "temperature": TEMPERATURE}
    fused = LayerFusionBackbone.from_encoder(
        SpecializedViTModel(config), layers="all", fusion_type="weighted_sum", fusion_options=options
    )
    model = DensePredictorForSemanticSegmentation.from_backbone(
        fused, id2label={0: "rest", 1: "nucleus", 2: "boundary"}
    )
    processor = SegmentationImageProcessorPil(do_resize=False)
    samples = [sample | {"image": stretched(sample["image"])} for sample in FolderSamples(CELLS / "train")]
    windows = SegmentationAugmentation(64, scale=(1.0, 1.0), vertical_flip=0.5, rotate=True)
    train_segmentation(
        model,
        SegmentationDataset(samples, processor, windows),
        output_dir=folder,
        max_steps=steps,
        learning_rate=2e-3,
        per_device_train_batch_size=8,
        save_strategy="no",
        logging_steps=100,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    return model.eval(), processor


def stretched(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Grey values from the darkest to the brightest hundredth; most pictures are nearly black."""
    grey = np.asarray(picture.convert("L")).astype(np.float32)
    low, high = np.percentile(grey, [1, 99])
    return PIL.Image.fromarray((255 * ((grey - low) / max(high - low, 1)).clip(0, 1)).astype(np.uint8)).convert("RGB")


def draw_cells():
    """Layer similarity and fused weights of the model trained on cells, and what `vitweave inspect` draws of it."""
    with tempfile.TemporaryDirectory() as temporary:
        model, processor = train_on_cells(Path(temporary))
        encoder = model.backbone.vision_encoder
        pictures = [stretched(sample["image"]).crop((0, 0, 128, 128)) for sample in FolderSamples(CELLS / "test")][:16]
        pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        vit = encoder.model if isinstance(encoder, VisionEncoder) else encoder
        draw_similarity(vit, pixels, model)
        report = Path(temporary, "report")
        inspect_model(vit, pictures[::4], report, processor=processor, options=InspectOptions(batch_size=4))
        for name in ("cosine", "pca"):
            found = next(path for path in report.glob("*.png") if name in path.name)
            shrink(found, IMAGES / f"inspect_{name}.png")


@torch.no_grad()
def draw_similarity(vit, pixels: torch.Tensor, model):
    """Mean cosine of the patch tokens of every pair of layers, beside the weights the fusion has learnt."""
    layers = list(range(BLOCKS + 1))
    features = VisionEncoder(vit, layers=layers, final_norm=False)(pixels)
    tokens = torch.stack([unit(patches - patches.mean(dim=(0, 1))) for patches in features.patches])
    cosine = torch.einsum("inph,jnph->ij", tokens, tokens) / (tokens.shape[1] * tokens.shape[2])
    weights = next(p for n, p in model.named_parameters() if n.endswith("layer_logits"))
    weights = (weights / TEMPERATURE).softmax(dim=0)
    figure = Figure(figsize=(7, 3.1), facecolor=PAPER, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    image = left.imshow(cosine.numpy(), cmap="viridis", vmin=0.5, vmax=1)
    for row in layers:
        for column in layers:
            value = float(cosine[row, column])
            left.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color="w" if value < 0.75 else "k"
            )
    left.set(xlabel="layer (0 = embeddings)", ylabel="layer", title="cosine of patch tokens")
    figure.colorbar(image, ax=left, shrink=0.8)
    right.bar(layers[1:], weights.numpy(), color=STRONG[ORANGE], alpha=0.85)
    right.axhline(1 / BLOCKS, color=INK, lw=1, ls=":")
    right.set(xlabel="layer", title="weights learnt by weighted_sum", facecolor=PAPER)
    right.text(BLOCKS + 0.45, 1 / BLOCKS, "start", fontsize=8, va="bottom", ha="right")
    for axes in (left, right):
        axes.title.set_size(10)
    save(figure, "cells_layers")


def shrink(source: Path, target: Path, width: int = 1000):
    """A picture of the report, small enough for a page."""
    with PIL.Image.open(source) as picture:
        picture = picture.convert("RGB")
        picture.thumbnail((width, 10 * width))
        picture.quantize(128, dither=PIL.Image.Dither.NONE).save(target, optimize=True)


def draw_tiling():
    """How pictures of three shapes are cut into at most six tiles."""
    sheet = Sheet(7, 2.5)
    figures = [json.loads(line) for line in (ROOT / "examples/data/figures/captions.jsonl").read_text().splitlines()]
    wanted, left = (2.6, 1.0, 0.62), 0.2
    for shape in wanted:
        sizes = []
        for entry in figures:
            with PIL.Image.open(ROOT / "examples/data/figures" / entry["image"]) as picture:
                sizes.append((abs(picture.width / picture.height - shape), entry["image"]))
        with PIL.Image.open(ROOT / "examples/data/figures" / min(sizes)[1]) as picture:
            picture = picture.convert("RGB")
        # the sizes such pictures have before they were reduced for this repository
        columns, rows = choose_grid(picture.width * 4, picture.height * 4, 448, max_tiles=6)
        height = 1.6 if columns <= 2 else 1.0
        width, tile = height * columns / rows, height / rows
        sheet.axes.imshow(picture.resize((300 * columns, 300 * rows)), extent=(left, left + width, 0.55, 0.55 + height))
        for x, y, x1, y1 in tile_boxes(columns, rows, 1):
            corner = (left + x * tile, 0.55 + y * tile)
            sheet.axes.add_patch(
                Rectangle(corner, (x1 - x) * tile, (y1 - y) * tile, fill=False, ec=STRONG[ORANGE], lw=2)
            )
        count = columns * rows
        note = f"{columns} x {rows} tiles" + ("\nand a thumbnail" if count > 1 else "")
        sheet.text(left + width / 2, 0.27, note, 9.5)
        left += width + 0.4
    sheet.axes.set(xlim=(0, 7), ylim=(0, 2.5))
    sheet.save("tiling")


FIGURES: dict[str, Callable[[], None]] = {
    name.removeprefix("draw_"): function
    for name, function in [*vars(diagrams).items(), *list(globals().items())]
    if name.startswith("draw_") and name != "draw_similarity"
}


if __name__ == "__main__":
    for name in sys.argv[1:] or FIGURES:
        FIGURES[name]()

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

import matplotlib
import numpy as np
import PIL.Image
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
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
ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
PAPER, INK, LINE = "#fbfbf9", "#24292f", "#57606a"  # dark ink on a light card reads in both themes
BLUE, ORANGE, GREEN, GREY, PINK = "#cfe3f7", "#fbdcc0", "#d3ecd0", "#e7e7e4", "#f3d3e2"
STRONG = {BLUE: "#3b78b5", ORANGE: "#d4722a", GREEN: "#4c9a45", GREY: "#77777a", PINK: "#b44a80"}


# Drawing ---------------------------------------------------------------------------------------------------------


class Sheet:
    """A canvas of `width` x `height` units for boxes and arrows; 7 units are 700 pixels on the page."""

    def __init__(self, width: float, height: float):
        self.figure = Figure(figsize=(width, height), facecolor=PAPER)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")

    def box(self, x: float, y: float, width: float, height: float, text: str = "", colour: str = GREY, size=10.5):
        shape = f"round,pad=0,rounding_size={min(0.08, height / 3)}"
        patch = FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=colour, edgecolor=STRONG[colour])
        self.axes.add_patch(patch)
        self.text(x + width / 2, y + height / 2, text, size)

    def text(self, x: float, y: float, text: str, size: float = 10.5, ha: str = "center", colour: str = INK, **words):
        self.axes.text(x, y, text, ha=ha, va="center", fontsize=size, color=colour, **words)

    def arrow(self, start: tuple, end: tuple, bend: float = 0.0, colour: str = LINE, style: str = "-|>", **words):
        curve = f"arc3,rad={bend}"
        patch = FancyArrowPatch(
            start, end, arrowstyle=style, mutation_scale=11, connectionstyle=curve, color=colour, lw=1.3, **words
        )
        patch.set_clip_on(False)
        self.axes.add_patch(patch)

    def save(self, name: str):
        save(self.figure, name)


def save(figure: Figure, name: str):
    """Write a PNG of few colours, small enough for a repository."""
    path = IMAGES / f"{name}.png"
    figure.savefig(path, dpi=150, facecolor=figure.get_facecolor(), metadata={"Software": None})
    with PIL.Image.open(path) as picture:
        small = picture.convert("RGB").quantize(128, dither=PIL.Image.Dither.NONE)
    small.save(path, optimize=True)


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


# Diagrams --------------------------------------------------------------------------------------------------------


def draw_specialized_vit():
    sheet = Sheet(7, 3.3)
    sheet.text(0.55, 2.85, "[CLS]", colour=STRONG[ORANGE], fontweight="bold")
    sheet.text(0.55, 1.25, "patches", colour=STRONG[BLUE], fontweight="bold")
    for x, name, twin in ((1.1, "norm1", "norm1_cls"), (2.35, "q k v", "q k v _cls"), (5.6, "norm2", "norm2_cls")):
        sheet.box(x, 2.6, 1.05, 0.5, twin, ORANGE)
        sheet.box(x, 1.0, 1.05, 0.5, name, BLUE)
    sheet.box(3.75, 0.85, 0.75, 2.4, "joint\nattention", GREY)
    sheet.box(4.7, 0.85, 0.7, 2.4, "output\nprojec-\ntion", GREY)
    for y in (2.85, 1.25):
        for start, end in ((0.85, 1.1), (2.15, 2.35), (3.4, 3.75), (4.5, 4.7), (5.4, 5.6), (6.65, 6.95)):
            sheet.arrow((start if start > 1 else 0.95, y), (end, y))
    sheet.text(1.62, 0.62, "every block", 9, colour=LINE)
    sheet.text(2.87, 0.62, "first third", 9, colour=LINE)
    sheet.text(4.6, 0.62, "shared", 9, colour=LINE)
    sheet.text(6.12, 0.62, "every block", 9, colour=LINE)
    sheet.text(
        3.5, 0.2, "a token goes through the weights of its role; nothing is computed twice but the [CLS] rows", 9.5
    )
    sheet.save("specialized_vit")


def draw_conversion():
    sheet = Sheet(7, 2.5)
    sheet.box(0.15, 0.5, 1.9, 1.55, "", BLUE)
    sheet.text(1.1, 1.8, "vanilla ViT", fontweight="bold")
    sheet.text(1.1, 1.2, "norm1\nq_proj k_proj v_proj\nnorm2 …", 10)
    sheet.box(3.15, 1.3, 3.7, 0.75, "norm1   q_proj k_proj v_proj   norm2 …", BLUE)
    sheet.box(3.15, 0.35, 3.7, 0.75, "norm1_cls   q_proj_cls …   norm2_cls", ORANGE)
    sheet.arrow((2.05, 1.65), (3.15, 1.68))
    sheet.arrow((2.05, 0.95), (3.15, 0.73))
    sheet.text(2.6, 1.87, "copied", 9.5)
    sheet.text(2.6, 0.55, "cloned", 9.5)
    sheet.text(5.0, 2.25, "specialised ViT: same outputs until it is trained", 10, fontweight="bold")
    sheet.arrow((3.15, 1.35), (2.05, 1.35), colour=STRONG[GREEN])
    sheet.text(2.6, 1.2, "to_vanilla()", 8.5, colour=STRONG[GREEN])
    sheet.save("conversion")


def draw_cls_lora():
    sheet = Sheet(7, 2.5)
    sheet.text(0.6, 1.9, "[CLS] row", colour=STRONG[ORANGE], fontweight="bold")
    sheet.text(0.6, 0.7, "patch rows", colour=STRONG[BLUE], fontweight="bold")
    sheet.box(1.6, 1.65, 1.7, 0.5, "q_proj_cls, frozen", GREY)
    sheet.box(1.6, 1.0, 0.8, 0.4, "A", ORANGE)
    sheet.box(2.5, 1.0, 0.8, 0.4, "B", ORANGE)
    sheet.box(1.6, 0.45, 1.7, 0.4, "q_proj, frozen", GREY)
    sheet.arrow((1.1, 1.9), (1.6, 1.9))
    sheet.arrow((1.25, 1.88), (1.6, 1.25), bend=0.3)
    sheet.arrow((1.15, 0.65), (1.6, 0.65))
    sheet.box(3.9, 1.65, 0.45, 0.5, "+", GREY, 13)
    sheet.arrow((3.3, 1.9), (3.9, 1.9))
    sheet.arrow((3.3, 1.2), (4.1, 1.65), bend=0.3)
    sheet.box(5.2, 0.45, 1.5, 1.7, "joint attention", GREY)
    sheet.arrow((4.35, 1.9), (5.2, 1.9))
    sheet.arrow((3.3, 0.65), (5.2, 0.65))
    sheet.text(3.5, 0.15, "trained: A and B of rank 16, the [CLS] norms, and the head", 9.5)
    sheet.save("cls_lora")


def draw_layer_fusion():
    sheet = Sheet(7, 3.4)
    for index, name in enumerate(("embeddings", "blocks 1-3", "blocks 4-6", "blocks 7-9", "blocks 10-12")):
        y = 0.25 + 0.6 * index
        sheet.box(0.4, y, 1.5, 0.44, name, GREY if index == 0 else BLUE)
        if index:
            sheet.arrow((1.15, y - 0.16), (1.15, y))
            sheet.arrow((1.9, y + 0.22), (3.0, 1.15 + 0.35 * index), bend=0.0)
            sheet.text(2.08, y + (0.42 if index < 3 else 0.1), f"$x_{index}$", 10)
    sheet.box(3.0, 1.2, 1.2, 1.7, "fusion\n$f(x_1 … x_4)$", ORANGE)
    sheet.arrow((4.2, 2.05), (4.75, 2.05))
    sheet.box(4.75, 1.8, 0.5, 0.5, "$\\gamma$", ORANGE, 13)
    sheet.arrow((5.25, 2.05), (5.65, 2.05))
    sheet.box(5.65, 1.8, 0.5, 0.5, "+", GREY, 13)
    sheet.arrow((6.15, 2.05), (6.85, 2.05))
    sheet.axes.plot([1.15, 1.15, 5.9], [3.09, 3.22, 3.22], color=LINE, lw=1.3)
    sheet.arrow((5.9, 3.22), (5.9, 2.3))
    sheet.text(4.6, 3.07, "base: what the encoder returns by itself", 9, colour=LINE)
    sheet.text(5.0, 1.55, "starts at 0", 9, colour=LINE)
    sheet.text(4.9, 0.5, "no block above the deepest layer asked for is run", 9.5)
    sheet.save("layer_fusion")


def draw_encoder_fusion():
    sheet = Sheet(7, 3.0)
    rows = ((2.15, "336 px", "ViT\n24 x 24 tokens", BLUE), (0.95, "1024 px", "ConvNet\n32 x 32 cells", GREEN))
    sheet.box(0.15, 1.5, 0.75, 0.75, "image", GREY)
    for y, size, name, colour in rows:
        sheet.arrow((0.9, 1.87), (1.75, y + 0.3))
        sheet.text(1.28, y + (0.42 if y > 1.5 else 0.28), size, 9, colour=LINE)
        sheet.box(1.75, y, 1.5, 0.62, name, colour, 10)
        sheet.arrow((3.25, y + 0.3), (3.95, 1.95 if y > 1.5 else 1.75))
    sheet.box(3.95, 1.3, 1.15, 1.1, "encoder\nfusion", ORANGE)
    sheet.arrow((5.1, 1.85), (5.5, 1.85))
    for index in range(6):
        sheet.box(5.5 + 0.22 * index, 1.65, 0.18, 0.4, "", PINK)
    sheet.text(6.15, 1.45, "one sequence or map", 9, colour=LINE)
    sheet.arrow((2.5, 1.57), (2.5, 2.15), linestyle=":")
    sheet.text(3.5, 0.4, "dotted: mixture_of_resolution also feeds the detail into the blocks of the ViT", 9.5)
    sheet.save("encoder_fusion")


def draw_vlm():
    sheet = Sheet(7, 2.3)
    sheet.box(0.2, 1.3, 1.0, 0.6, "tiles", GREY)
    sheet.box(1.6, 1.3, 1.3, 0.6, "tower of\nencoders", BLUE)
    sheet.box(3.3, 1.3, 1.1, 0.6, "projector", ORANGE)
    sheet.box(4.95, 0.35, 1.75, 1.55, "causal\nlanguage model", GREEN)
    sheet.box(0.2, 0.35, 4.2, 0.5, "USER: <image> Describe the image. ASSISTANT: …", GREY, 10)
    for start, end in (
        ((1.2, 1.6), (1.6, 1.6)),
        ((2.9, 1.6), (3.3, 1.6)),
        ((4.4, 1.6), (4.95, 1.6)),
        ((4.4, 0.6), (4.95, 0.6)),
    ):
        sheet.arrow(start, end)
    sheet.text(2.25, 2.08, "frozen, cached", 9, colour=LINE)
    sheet.text(3.85, 2.08, "stage 1", 9, colour=LINE)
    sheet.text(5.82, 2.08, "stage 2, or LoRA", 9, colour=LINE)
    sheet.save("vision_language")


def draw_modality_fusion():
    sheet = Sheet(7, 3.1)
    for y, name, colour in ((2.15, "rgb", BLUE), (0.75, "depth", ORANGE)):
        sheet.text(0.5, y + 0.25, name, fontweight="bold", colour=STRONG[colour])
        sheet.box(1.05, y, 0.85, 0.5, "norm", colour)
        sheet.box(2.2, y, 1.1, 0.5, "attention", GREY)
        sheet.box(5.0, y, 0.75, 0.5, "norm", colour)
        sheet.box(6.0, y, 0.65, 0.5, "MLP", GREY)
        for start, end in ((0.8, 1.05), (1.9, 2.2), (3.3, 3.6), (4.7, 5.0), (5.75, 6.0), (6.65, 6.95)):
            sheet.arrow((start, y + 0.25), (end, y + 0.25))
    sheet.box(3.6, 0.75, 1.1, 1.9, "fusion", GREEN, 11.5)
    sheet.arrow((4.15, 1.15), (4.15, 1.55), style="<|-|>")
    sheet.arrow((4.15, 1.85), (4.15, 2.25), style="<|-|>")
    sheet.text(2.75, 1.7, "same weights\nfor all sensors", 9, colour=LINE)
    sheet.text(1.47, 1.7, "one per\nsensor", 9, colour=LINE)
    sheet.text(3.6, 0.32, "token i of one sensor meets token i of the others; an absent sensor is never read", 9.5)
    sheet.save("modality_fusion")


def draw_feature_cache():
    sheet = Sheet(7, 2.4)
    sheet.box(0.2, 0.8, 1.0, 0.7, "images", GREY)
    sheet.box(1.7, 0.8, 1.2, 0.7, "frozen\nencoder", BLUE)
    sheet.box(3.5, 0.8, 1.35, 0.7, "safetensors\nshards", GREEN)
    sheet.box(5.5, 0.8, 1.2, 0.7, "head", ORANGE)
    for start, end in ((1.2, 1.7), (2.9, 3.5), (4.85, 5.5)):
        sheet.arrow((start, 1.15), (end, 1.15))
    sheet.text(2.3, 0.5, "once", 10, colour=STRONG[BLUE], fontweight="bold")
    sheet.text(5.2, 0.5, "every epoch", 10, colour=STRONG[ORANGE], fontweight="bold")
    sheet.text(3.5, 1.95, "key = SHA-256(weights, config, code, versions, processor, layers, dtype; image; label)", 9.5)
    sheet.arrow((4.17, 1.83), (4.17, 1.5))
    sheet.save("feature_cache")


# Bars of what was measured ---------------------------------------------------------------------------------------


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
    groups = {"patch_info_mining": [], "mr_adapter": [], "spatial_vision_aggregator": []}
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


def train_on_cells(folder: Path, steps: int = 400):
    """A small specialised ViT from scratch, whose six layers a dense weighted sum fuses below a linear head."""
    set_seed(0)
    config = SpecializedViTConfig(
        hidden_size=64, num_hidden_layers=BLOCKS, num_attention_heads=4, patch_size=4, image_size=64,
        position_embedding_type="rotary",
    )  # fmt: skip
    options = {"dense": True, "direct": True}
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
    weights = next(p for n, p in model.named_parameters() if n.endswith("layer_logits")).softmax(dim=0)
    figure = Figure(figsize=(7, 3.1), facecolor=PAPER, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    image = left.imshow(cosine.numpy(), cmap="viridis", vmin=0, vmax=1)
    for row in layers:
        for column in layers:
            value = float(cosine[row, column])
            left.text(
                column, row, f"{value:.1f}", ha="center", va="center", fontsize=7.5, color="w" if value < 0.6 else "k"
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
    for name, function in list(globals().items())
    if name.startswith("draw_") and name != "draw_similarity"
}


if __name__ == "__main__":
    for name in sys.argv[1:] or FIGURES:
        FIGURES[name]()

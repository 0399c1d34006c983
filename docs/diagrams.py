"""The diagrams of the documentation: boxes and arrows, drawn by matplotlib. `make_figures.py` runs them."""

from pathlib import Path

import PIL.Image
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
PAPER, INK, LINE = "#fbfbf9", "#24292f", "#57606a"  # dark ink on a light card reads in both themes
BLUE, ORANGE, GREEN, GREY, PINK = "#cfe3f7", "#fbdcc0", "#d3ecd0", "#e7e7e4", "#f3d3e2"
STRONG = {BLUE: "#3b78b5", ORANGE: "#d4722a", GREEN: "#4c9a45", GREY: "#77777a", PINK: "#b44a80"}


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

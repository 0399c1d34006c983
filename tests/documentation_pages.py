"""What the pages of the documentation hold: Python blocks, commands, links; and the files their snippets open."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from transformers import ConvNextConfig, ConvNextModel, Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
CARDS = sorted((ROOT / "model_cards").glob("*.md"))
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and code, the heading above it, its first line, and why it is not run, if so."""

    language: str
    code: str
    heading: str
    line: int
    not_run: str | None


def blocks_of(page: Path, language: str) -> list[Block]:
    """The blocks of one language, in order."""
    text, found = page.read_text(encoding="utf-8"), []
    for fence in FENCE.finditer(text):
        before = text[: fence.start()]
        if fence[2] == language:
            headings = HEADING.findall(FENCE.sub("", before))
            reason = NOT_RUN.search(before)
            line = before.count("\n") + 2
            found.append(Block(fence[2], fence[3], headings[-1] if headings else "", line, reason and reason[1]))
    return found


def links_of(page: Path) -> list[str]:
    """Targets of links and pictures outside of code, without their anchors; the web's are left out."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    targets = (target.split("#")[0] for target in LINK.findall(text))
    return [target for target in targets if target and not re.match(r"[a-z]+:", target)]


def commands_of(page: Path) -> list[list[str]]:
    """The commands of the bash blocks as words, without comments."""
    commands = []
    for block in blocks_of(page, "bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                commands.append(words[:end])
                words = words[end + 1 :]
    return [command for command in commands if command]


# What stands on the disk of the reader ---------------------------------------------------------------------------

VIT = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 2, "image_size": 224}
CHECKPOINTS = {
    "facebook/dinov2-base": lambda: Dinov2Model(Dinov2Config(**VIT, patch_size=14, mlp_ratio=1)),
    "facebook/dinov2-small": lambda: Dinov2Model(Dinov2Config(**VIT, patch_size=14, mlp_ratio=1)),
    "google/vit-base-patch16-224": lambda: ViTForImageClassification(
        ViTConfig(**VIT, patch_size=16, intermediate_size=32, num_labels=10)
    ),
    "facebook/convnext-tiny-224": lambda: ConvNextModel(
        ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    ),
}


def write_checkpoints(folder: Path) -> None:
    """Tiny models under the published ids: a folder of that name below the working directory is what
    `from_pretrained` opens before it asks the Hub."""
    for name, build in CHECKPOINTS.items():
        build().save_pretrained(folder / name)


def write_pictures(folder: Path) -> None:
    """A room in colour and depth, and the test part of a depth data set."""
    rng = np.random.default_rng(0)
    colour = PIL.Image.fromarray(rng.integers(0, 256, (56, 70, 3), dtype=np.uint8))
    depth = PIL.Image.fromarray(rng.integers(500, 9000, (56, 70)).astype(np.uint16))
    for name in ("nyu/test/rgb", "nyu/test/depth"):
        (folder / name).mkdir(parents=True)
    for picture, names in ((colour, ("room.jpg", "nyu/test/rgb/0.png")), (depth, ("room.png", "nyu/test/depth/0.png"))):
        for name in names:
            picture.save(folder / name)

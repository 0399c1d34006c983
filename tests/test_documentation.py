"""The documentation is true: its Python blocks run, its commands exist with their flags, its links lead somewhere."""

import argparse
import configparser
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from documentation_pages import CARDS, PAGES, ROOT, blocks_of, commands_of, links_of, write_checkpoints, write_pictures
from tiny_vlm import tiny_vlm_config, tiny_vlm_processor
from transformers import AutoModel, ViTImageProcessorPil

from vitweave import PUBLIC
from vitweave.analysis.report import InspectOptions
from vitweave.cli import build_parser
from vitweave.modeling.modeling_depth import DensePredictorForDepthEstimation
from vitweave.modeling.modeling_multi_encoder_vlm import MultiEncoderVlmForConditionalGeneration
from vitweave.modeling.modeling_specialized_vit import SpecializedViTBackbone
from vitweave.training.synthetic_figures import write_figures

SLOW = {"README.md"} | {
    f"docs/{name}.md"
    for name in (
        "classification",
        "feature_cache",
        "modality_fusion",
        "publishing",
        "recipes",
        "retrieval",
        "segmentation",
        "vision_language",
    )
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# What snippets take for granted ----------------------------------------------------------------------------------


def depth_model() -> dict:
    backbone = SpecializedViTBackbone.from_vit("facebook/dinov2-small", out_indices=[12])
    return {"model": DensePredictorForDepthEstimation.from_backbone(backbone)}


def encoders() -> dict:
    names = {"vit": "facebook/dinov2-base", "convnext": "facebook/convnext-tiny-224"}
    return {word: AutoModel.from_pretrained(name) for word, name in names.items()}


def language_model() -> dict:
    model = MultiEncoderVlmForConditionalGeneration(tiny_vlm_config())
    return {"model": model, "processor": tiny_vlm_processor()}


def figures() -> dict:
    write_figures("FOLDER", {"train": 8, "validation": 4})
    return {}


def classifier_pictures() -> dict:
    return {"processor": ViTImageProcessorPil(size={"height": 224, "width": 224})}


def few_pictures() -> dict:
    return {"options": InspectOptions(limit=2, plots=False)}


# page -> heading above a block -> what the reader is supposed to have there
PRELUDES: dict[str, dict[str, Callable[[], dict]]] = {
    "README.md": {
        "Depth": depth_model,
        "Layer fusion": lambda: {"pixel_values": torch.randn(1, 3, 224, 224)},
        "Encoder fusion": encoders,
        "Vision-language models over several encoders": lambda: language_model() | figures(),
    },
    "docs/vision_language.md": {"Vision-language models over several encoders": figures},
    "docs/classification.md": {"Classification and probes": classifier_pictures},
    "docs/inspecting.md": {"Looking inside": few_pictures},
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """A working directory with tiny checkpoints under the published names."""
    folder = tmp_path_factory.mktemp("documentation")
    torch.manual_seed(0)
    write_checkpoints(folder)
    return folder


@pytest.fixture
def desk(checkpoints, tmp_path, monkeypatch) -> Path:
    """An own working directory for a page, with the checkpoints, pictures and the shipped examples."""
    for source in (*checkpoints.iterdir(), ROOT / "examples"):
        (tmp_path / source.name).symlink_to(source)
    write_pictures(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_python() -> list:
    pages = [page for page in PAGES if blocks_of(page, "python")]
    marks = {True: [pytest.mark.slow], False: []}
    return [pytest.param(page, id=name_of(page), marks=marks[name_of(page) in SLOW]) for page in pages]


@pytest.mark.parametrize("page", with_python())
def test_python_blocks_run(page, desk):
    """The blocks of a page in order, in one namespace; an error names the line of the page."""
    namespace, preludes = {"__name__": "snippet"}, PRELUDES.get(name_of(page), {})
    entered = set()
    for block in blocks_of(page, "python"):
        if block.not_run is not None:
            continue
        if block.heading in preludes and block.heading not in entered:
            namespace |= preludes[block.heading]()
        entered.add(block.heading)
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)
    assert not set(preludes) - entered, "a prelude whose heading no block has"


def test_few_blocks_are_left_out():
    left_out = [
        (name_of(page), b.not_run) for page in PAGES for b in blocks_of(page, "python") if b.not_run is not None
    ]
    assert len(left_out) <= 2, left_out


# Commands --------------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """A script has read its arguments; the rest of it is not run."""


COMMANDS = sorted({tuple(command) for page in PAGES for command in commands_of(page)})
SCRIPTS = [command for command in COMMANDS if command[0] == "python"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "vitweave"], ids=" ".join)
def test_the_command_line_takes(command):
    build_parser().parse_args(command[1:])


@pytest.mark.parametrize("command", SCRIPTS, ids=" ".join)
def test_the_script_takes(command, monkeypatch):
    script = ROOT / command[1]
    assert script.is_file(), f"no {command[1]}"
    if "ArgumentParser" not in script.read_text():
        assert len(command) == 2, f"{command[1]} takes no arguments"
        return
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(parser, args=None, namespace=None, **options):
        _, unknown = parse(parser, args, namespace, **options)
        assert not unknown, f"{command[1]} does not know {unknown}"
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [str(script), *command[2:]])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


def test_targets_and_extras_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    for command in COMMANDS:
        if command[0] == "make":
            assert set(command[1:]) <= targets, command
        elif command[0] == "pip":
            named = re.search(r"\[(.*)\]", " ".join(command))
            assert named is None or set(named[1].split(",")) <= extras, command
        else:
            assert command[0] in ("git", "cd", "python", "vitweave"), f"a command that nobody checks: {command}"


# Links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=name_of)
def test_links_lead_somewhere(page):
    lost = [target for target in links_of(page) if not (page.parent / target).exists()]
    assert not lost


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert named == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.parent != ROOT}


def test_api_pages_name_modules_of_the_package():
    for page in (ROOT / "docs" / "api").glob("*.md"):
        modules = re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
        assert modules, page
        lost = [name for name in modules if not (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()]
        assert not lost


def test_every_public_name_is_on_an_api_page():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    assert not set(PUBLIC.values()) - set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))


def test_pictures_stay_small():
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert sum(path.stat().st_size for path in pictures) < 1.5 * 2**20
    used = {(page.parent / target).resolve() for page in PAGES for target in links_of(page)}
    assert {path.resolve() for path in pictures} <= used, "a picture that no page shows"

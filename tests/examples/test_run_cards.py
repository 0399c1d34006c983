"""What a training example leaves can be exported and verified on its data, with nothing written by hand."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from vitweave.cli import main
from vitweave.training.synthetic_classes import SyntheticClasses
from vitweave.training.synthetic_figures import write_figures
from vitweave.training.synthetic_shapes import SyntheticDepth, SyntheticShapes

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--layers", "1", "2", "--size", "32", "32", "--steps", "4", "--eval_every", "2", "--batch_size", "4"]


def write_pairs(data: Path, samples, map_folder: str) -> None:
    """The same pictures in both parts."""
    for part in ("train", "val"):
        for name in ("image", map_folder):
            (data / part / name).mkdir(parents=True)
        for index in range(len(samples)):
            samples[index]["image"].save(data / part / "image" / f"{index}.png")
            if map_folder == "depth":
                np.save(data / part / "depth" / f"{index}.npy", samples[index]["depth"])
            else:
                samples[index]["label"].save(data / part / "label" / f"{index}.png")


def segmentation(data: Path) -> list[str]:
    write_pairs(data, SyntheticShapes(6), "label")
    (data / "meta.json").write_text(json.dumps({"id2label": SyntheticShapes.id2label}))
    return ["--data", str(data), *SMALL, "--workers", "0"]


def depth(data: Path) -> list[str]:
    write_pairs(data, SyntheticDepth(6), "depth")
    return ["--data", str(data), *SMALL, "--depth_scale", "1"]


def classification(data: Path) -> list[str]:
    pictures, encoder = SyntheticClasses(9), str(data / "encoder")
    for part in ("train", "validation"):
        for index in range(len(pictures)):
            folder = data / part / pictures.id2label[pictures[index]["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            pictures[index]["image"].save(folder / f"{index}.png")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(**small, image_size=32, patch_size=8)).save_pretrained(encoder)
    ViTImageProcessorPil().save_pretrained(encoder)
    return ["--data", str(data), "--encoder", encoder, "--size", "32", "--steps", "4", "--eval-every", "2"]


def rgbx_segmentation(data: Path) -> list[str]:
    draw_scenes = runpy.run_path(str(EXAMPLES / "train_rgbx_segmentation.py"))["draw_scenes"]
    draw_scenes(data, 12)
    small = ["--size", "32", "48", "--steps", "4", "--eval_every", "2", "--batch_size", "4"]
    return ["--data", str(data), *small, "--modality_dropout", "0.3"]


def translation(data: Path) -> list[str]:
    draw_scenes = runpy.run_path(str(EXAMPLES / "train_translation.py"))["draw_scenes"]
    draw_scenes(data, 12)
    small = ["--size", "32", "48", "--crop", "32", "32", "--steps", "4", "--eval_every", "2", "--batch_size", "4"]
    stages = {"hidden_sizes": [16] * 5, "num_attention_heads": [1] * 5, "depths": [1] * 5, "sr_ratios": [1] * 5}
    return ["--data", str(data), "--modalities", "shade", "edge", *small, "--stream", json.dumps(stages)]


def retrieval(data: Path) -> list[str]:
    write_figures(data, {"train": 12, "validation": 6, "test": 6})
    records = [json.loads(line) for line in (data / "captions.jsonl").read_text().splitlines()]
    titled = (json.dumps(record | {"title": record["sentences"][0]}) for record in records)
    (data / "captions.jsonl").write_text("\n".join(titled))
    small = ["--size", "32", "--steps", "4", "--eval_every", "2", "--batch_size", "4", "--max_length", "48"]
    return ["--data", str(data), *small, "--text_columns", "title", "caption", "--test"]


@pytest.mark.slow
@pytest.mark.parametrize("example", [segmentation, depth, classification, rgbx_segmentation, translation, retrieval])
def test_a_run_is_exported_and_verified_as_it_is(example, tmp_path, monkeypatch, capsys):
    script = str(EXAMPLES / f"train_{example.__name__}.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *example(tmp_path / "things"), "--out", "run"])
    runpy.run_path(script, run_name="__main__")
    assert main(["export", "run", "out", "--no-verify"]) == 0
    capsys.readouterr()
    assert main(["verify", "out", "--data", "things=things", "--tolerance", "1e-5"]) == 0
    told = capsys.readouterr().out
    assert "things: data as published" in told and "recomputed " in told and "not recomputed" not in told
    assert "--out run" in (tmp_path / "out" / "README.md").read_text()

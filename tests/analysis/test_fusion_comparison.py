"""Layer fusions side by side: features computed once, finished runs kept, an honest table."""

import json

import pytest
import torch
from tiny_retriever import tiny_dataset

from vitweave.analysis import fusion_comparison
from vitweave.analysis.fusion_comparison import BASELINE, ComparisonOptions, compare_fusions
from vitweave.analysis.fusion_report import best_first, chance_rsum, markdown_table, write_report
from vitweave.cli import main
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.layer_fusion.registry import LAYER_FUSIONS
from vitweave.modeling.modeling_specialized_vit import SpecializedViTModel
from vitweave.processing.image_processing_pil_figure import FigureImageProcessorPil
from vitweave.training.synthetic_figures import write_figures

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
OPTIONS = {"steps": 2, "batch_size": 4, "text_size": 16, "text_layers": 1, "projection_dim": 8, "resamples": 50}


class CountingViT(SpecializedViTModel):
    """Counts its runs."""

    runs = 0


def encoder():
    torch.manual_seed(0)
    model = SpecializedViTModel(SpecializedViTConfig(**SMALL, use_mask_token=False))
    model.embeddings.register_forward_hook(lambda *_: setattr(CountingViT, "runs", CountingViT.runs + 1))
    return model


def datasets():
    processor = tiny_dataset(8).processor
    processor.image_processor = FigureImageProcessorPil(size=64, patch_size=16)
    parts = tiny_dataset(8, draw=True), tiny_dataset(6)
    for part in parts:
        part.processor = processor
    return parts


def compare(folder, fusions, seeds=(0,), **options):
    return compare_fusions(encoder(), *datasets(), folder, fusions, seeds, ComparisonOptions(**OPTIONS | options))


@pytest.mark.slow
def test_every_fusion_reads_features_that_were_computed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(CountingViT, "runs", 0)
    rows = compare(tmp_path, list(LAYER_FUSIONS), layers=(1, 2))
    assert [row["fusion"] for row in rows] == [BASELINE, *LAYER_FUSIONS]
    assert CountingViT.runs == 4  # one batch of each split, and one of each to know the size of its features
    for row in rows:
        assert 0 <= row["low"] <= row["rsum"] <= row["high"] <= 6
        assert (row["parameters"] > 0) == (row["milliseconds"] > 0) == (row["fusion"] != BASELINE)
    assert "difference" not in rows[0] and rows[1]["difference"]["rsum"] == rows[1]["rsum"] - rows[0]["rsum"]


@pytest.mark.slow
def test_finished_runs_are_kept_and_others_added(tmp_path, monkeypatch):
    first = compare(tmp_path, ["concat"])
    trained = []
    real = fusion_comparison.one_run
    monkeypatch.setattr(fusion_comparison, "one_run", lambda *args: trained.append((args[1], args[2])) or real(*args))
    again = compare(tmp_path, ["concat"], seeds=(0, 1))
    assert trained == [(BASELINE, 1), ("concat", 1)]
    assert again[1]["seeds"][0] == first[1]["seeds"][0]
    mean = sum(entry["rsum"] for entry in again[1]["seeds"]) / 2
    assert again[1]["rsum"] == pytest.approx(mean)
    compare(tmp_path, ["concat"], fusion_options={"concat": {"norm": "none"}})
    assert trained[2:] == [("concat", 0)]  # the baseline does not depend on it
    compare(tmp_path, ["concat", "film"])  # reads patches, which the others do not
    assert trained[3:] == [("concat", 0), ("film", 0)]  # concat's options are the first ones again


def test_wrong_names_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="'sum'"):
        compare(tmp_path, ["sum"])
    with pytest.raises(ValueError, match=r"options of the fusions \['concat'\]"):
        compare(tmp_path, ["concat"], fusion_options={"fpn": {}})
    with pytest.raises(ValueError, match='norm="shared"'):
        compare(tmp_path, ["concat"], fusion_options={"concat": {"norm": "shared"}})
    assert not list(tmp_path.iterdir())


def row(name, rsum, **more):
    recall = {f"{way}_R@{k}": rsum / 6 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    seeds = [{"seed": 0, "rsum": rsum, "low": rsum - 0.1, "high": rsum + 0.1}]
    facts = {"fusion": name, "rsum": rsum, "low": rsum - 0.1, "high": rsum + 0.1, "seeds": seeds, "recall": recall}
    return {**facts, "parameters": 1234, "milliseconds": 0.5, **more}


def test_report(tmp_path):
    gain = {"rsum": 0.3, "low": 0.05, "high": 0.5}
    rows = [row(BASELINE, 1.2), row("fpn", 0.9, difference=gain), row("graph", 1.5, difference=gain)]
    assert [entry["fusion"] for entry in best_first(rows)] == [BASELINE, "graph", "fpn"]
    table = write_report(rows, tmp_path, {"data": "figures"})
    assert table == markdown_table(best_first(rows))
    assert "| graph | 150.0 | 140.0 to 160.0 | +30.0 (+5.0 to +50.0) | 150.0 |" in table
    assert "1,234 | 0.500 |" in table
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"][1]["fusion"] == "graph"
    assert "- data: figures" in (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert (tmp_path / "comparison.png").stat().st_size > 1000


def test_chance():
    assert chance_rsum(100) == pytest.approx(0.32)
    assert chance_rsum(4) == pytest.approx(2 * (0.25 + 1 + 1))


@pytest.mark.slow
def test_command(tmp_path, capsys):
    write_figures(tmp_path / "data", {"train": 10, "validation": 6})
    model = encoder()
    model.save_pretrained(tmp_path / "encoder")
    FigureImageProcessorPil(size=64, patch_size=16, image_mean=[0.4] * 3).save_pretrained(tmp_path / "encoder")
    command = ["compare-fusions", str(tmp_path / "encoder"), str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    options = "--fusions concat --seeds 0 1 --steps 2 --batch-size 4 --text-size 16 --text-layers 1 --layers 1 2"
    assert main([*command, *options.split(), "--no-plot"]) == 0
    printed = capsys.readouterr().out
    assert "concat, seed 1: RSUM" in printed and "| last_layer_cls |" in printed
    assert (tmp_path / "out" / "comparison.md").is_file() and not (tmp_path / "out" / "comparison.png").exists()
    assert main([*command, "--where", '{"split": "nowhere"}']) == 2

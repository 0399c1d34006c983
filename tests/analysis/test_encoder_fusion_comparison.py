"""Encoder fusions side by side: features computed once, rates chosen on training images, finished runs kept."""

import json

import pytest
import torch
from tiny_encoders import build
from transformers import ViTImageProcessorPil

from vitweave.analysis import encoder_fusion_comparison
from vitweave.analysis.bootstrap import resampled_sums
from vitweave.analysis.encoder_fusion_comparison import (
    ADAPTERS,
    EncoderComparison,
    EncoderComparisonOptions,
    EncoderFeatures,
    add_differences,
    compare_encoder_fusions,
    split,
)
from vitweave.analysis.encoder_fusion_report import best_first, markdown_table, write_report
from vitweave.modeling.encoder_fusion.registry import ENCODER_FUSIONS
from vitweave.training.classification_data import ImageClassificationDataset
from vitweave.training.synthetic_classes import SyntheticClasses

TOWER = {"image_size": 32, "encoder_options": [{}, {"image_size": 64}]}  # 4x4 and 2x2 cells
OPTIONS = {"steps": 2, "batch_size": 4, "learning_rates": (1e-3,), "resamples": 50}


def data(length, seed=0):
    return ImageClassificationDataset(
        SyntheticClasses(length, seed=seed), ViTImageProcessorPil(size={"height": 32, "width": 32})
    )


def encoders():
    return [build("dinov2"), build("convnext")]


def compare(folder, fusions=tuple(ENCODER_FUSIONS), seeds=(0,), models=None, **options):
    options = EncoderComparisonOptions(**OPTIONS | options)
    return compare_encoder_fusions(
        models or encoders(), data(10), data(6, seed=1), folder, fusions, seeds, options, TOWER
    )


@pytest.mark.slow
def test_every_fusion_trains_on_features_that_were_computed_once(tmp_path):
    models, runs = encoders(), []
    models[0].embeddings.register_forward_hook(lambda *_: runs.append(1))
    rows = compare(tmp_path, models=models)
    assert [row["name"] for row in rows] == ["dinov2 alone", "convnext alone", "channel_concat"] + [
        name for name in ENCODER_FUSIONS if name != "channel_concat"
    ]
    assert len(runs) == 4  # a batch of each split, and one of each to know the size of its features
    for row in rows:
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 and row["train_loss"] > 0
    costs = {row["name"]: row["parameters"] for row in rows}
    assert costs["dinov2 alone"] == costs["channel_concat"] == 0 < costs["add"] < costs["query_former"]
    order = {row["name"]: row["encoders"] for row in rows}
    assert order["patch_info_mining"] == [1, 0] and order["add"] == [0, 1]


@pytest.mark.slow
def test_adapters_train_on_images_between_the_blocks(tmp_path):
    models, runs = encoders(), []
    models[0].embeddings.register_forward_hook(lambda *_: runs.append(1))
    rows = compare(tmp_path, ["mixture_of_resolution"], models=models, adapters=True)
    kept, online = rows[-2:]
    assert online["name"] == ADAPTERS and online["parameters"] > kept["parameters"]
    assert len(runs) == 4 + 2 + 2  # two steps and two batches of the validation images


@pytest.mark.slow
def test_finished_runs_are_kept_and_others_added(tmp_path, monkeypatch):
    trained, real = [], encoder_fusion_comparison.one_run

    def count(comparison, row, seed, *rest):
        trained.append((row.name, seed))
        return real(comparison, row, seed, *rest)

    monkeypatch.setattr(encoder_fusion_comparison, "one_run", count)
    first = compare(tmp_path, ["add"])
    assert len(trained) == 4
    again = compare(tmp_path, ["add"], seeds=(0, 1))
    assert [seed for _, seed in trained[4:]] == [1] * 4
    assert again[-1]["seeds"][0] == first[-1]["seeds"][0]
    compare(tmp_path, ["add"], fusion_options={"add": {"direct": True}})
    assert trained[8:] == [("add", 0)]  # the other rows do not depend on it


def test_the_rate_is_chosen_without_the_validation_images(tmp_path, monkeypatch):
    asked = []

    def run(comparison, row, seed, rate, train, validation):
        asked.append((rate, len(train), len(validation)))
        return {"accuracy": 0.5, "loss": abs(rate - 0.3), "right": [1, 0] * 3, "seconds": 0.0, "train_loss": 1.0}

    monkeypatch.setattr(encoder_fusion_comparison, "one_run", run)
    rows = compare(tmp_path, ["channel_concat"], seeds=(0, 1), learning_rates=(0.9, 0.1, 0.3, 2.7))
    assert {row["learning_rate"] for row in rows} == {0.3}  # equal accuracy: the lowest loss
    assert asked[:5] == [(0.1, 8, 2), (0.3, 8, 2), (0.9, 8, 2), (0.3, 10, 6), (0.3, 10, 6)]  # 0.9 no longer helps


def test_the_held_out_images_are_not_trained_on():
    rest, held_out = split(list(range(50)), 0.2)
    assert len(held_out) == 10 and sorted([*rest, *held_out]) == list(range(50))
    assert list(split(list(range(50)), 0.2)[1]) == list(held_out)


def test_kept_features_are_those_of_the_tower(tmp_path):
    comparison = EncoderComparison(
        encoders(), data(4), data(3, seed=1), tmp_path, EncoderComparisonOptions(**OPTIONS), TOWER
    )
    comparison.keep_features()
    (row,) = [row for row in comparison.rows(["patch_info_mining"]) if row.name == "patch_info_mining"]
    model = comparison.build(row).eval()
    features = EncoderFeatures(comparison.features[1], row.encoders).__getitems__([2, 0]).batch
    pixels = torch.stack([comparison.images[1][index]["pixel_values"] for index in (2, 0)])
    with torch.no_grad():
        torch.testing.assert_close(model(encoder_outputs=features["encoder_outputs"]).logits, model(pixels).logits)


def test_wrong_names_and_sizes_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="'sum'"):
        compare(tmp_path, ["sum"])
    with pytest.raises(ValueError, match=r"options of the fusions \['add'\]"):
        compare(tmp_path, ["add"], fusion_options={"deformable": {}})
    with pytest.raises(ValueError, match="as many tokens of every encoder"):
        compare(tmp_path, ["sequence_concat"], fusion_options={"sequence_concat": {"order": "interleave"}})
    assert not list(tmp_path.iterdir())


def row(name, accuracy, right, **more):
    facts = {"name": name, "accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1}
    costs = {"learning_rate": 1e-3, "parameters": 1234, "milliseconds": 0.5}
    samples = resampled_sums(torch.tensor(right, dtype=torch.float64)[:, None], 100)[:, 0] / len(right)
    return {**facts, **costs, "seeds": [{"seed": 0, "accuracy": accuracy}], "samples": samples, **more}


def test_differences_are_to_the_better_encoder_and_to_concatenation():
    rows = [row("a", 0.25, [1, 0, 0, 0]), row("b", 0.5, [1, 1, 0, 0]), row("channel_concat", 0.5, [1, 0, 1, 0])]
    rows = add_differences([*rows, row("add", 0.75, [1, 1, 1, 0])], 2)
    assert "differences" not in rows[0] and set(rows[2]["differences"]) == {"alone"}
    assert rows[3]["differences"]["alone"]["accuracy"] == 0.25 and "samples" not in rows[3]
    # never worse than b on any image, so on no resample
    assert rows[3]["differences"]["alone"]["low"] >= 0 > rows[2]["differences"]["alone"]["low"]


def test_report(tmp_path):
    rows = [row("a", 0.5, [1, 0]), row("channel_concat", 0.5, [1, 0]), row("add", 1.0, [1, 1])]
    rows = add_differences(rows, 1)
    assert [entry["name"] for entry in best_first(rows)] == ["a", "add", "channel_concat"]
    table = write_report(rows, tmp_path, {"data": "clothes"})
    assert table == markdown_table(best_first(rows))
    assert "| add | 100.0 | 90.0 to 110.0 | 100.0 | +50.0 (" in table and "| 0.001 | 1,234 | 0.50 |" in table
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"][1]["name"] == "add"
    assert "- data: clothes" in (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert (tmp_path / "comparison.png").stat().st_size > 1000

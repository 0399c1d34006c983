"""`vitweave search-fusion`: one command from encoders and a folder to a trained model and the reasons for it."""

import json
import sys

import pytest
import torch
from fusion_searches import COUNTS, data_folder, encoder_folder
from transformers import (
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.13's top-level name needs torchvision
from transformers.models.auto.processing_auto import AutoProcessor

from vitweave.analysis.fusion_search_tasks import SearchTask
from vitweave.auto import register
from vitweave.cli import main
from vitweave.training.depth_data import DepthDataset
from vitweave.training.depth_evaluation import evaluate_depth
from vitweave.training.metrics import ConfusionMatrix, predicted_classes
from vitweave.training.retrieval_data import RetrievalDataset
from vitweave.training.retrieval_evaluation import evaluate_retrieval
from vitweave.training.segmentation_data import SegmentationDataset
from vitweave.training.synthetic_figures import write_figures

SPACE = "--fusions concat weighted_sum --layers middle_last 1"
FEW = f"{SPACE} --steps 4 --first-steps 1 --batch-size 4 --seeds 0 --no-plot --quiet"


@pytest.fixture
def encoder(tmp_path):
    return encoder_folder(tmp_path)


def search(out, encoders, data, task, *more):
    return main(["search-fusion", *encoders, "--data", data, "--task", task, "--out", str(out), *FEW.split(), *more])


def found_in(out):
    return json.loads((out / "search.json").read_text())


@torch.no_grad()
def mean_iou(folder, data):
    """From pixels, with nothing but the saved folder."""
    model = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    dataset = SegmentationDataset.from_folder(data, AutoImageProcessor.from_pretrained(folder))
    confusion = ConfusionMatrix(model.config.num_labels)
    for item in (dataset[index] for index in range(len(dataset))):
        logits = model(item["pixel_values"][None]).logits
        confusion.update(predicted_classes(logits, item["labels"][None]), item["labels"][None])
    return confusion.compute()["mean_iou"]


def test_the_saved_model_is_the_one_that_was_measured(encoder, tmp_path, capsys):
    data, out = data_folder(tmp_path / "data", "segmentation"), tmp_path / "out"
    assert search(out, [encoder], data, "segmentation", "--label-stride", "2") == 0
    found = found_in(out)
    assert [row["name"] for row in found["final"][:1]] == [found["chosen"]]
    assert {"layer 3", "concat 1 2 3"} <= {row["name"] for row in found["final"]}
    assert mean_iou(out / "model", f"{data}/val") == pytest.approx(found["final"][0]["seeds"][0]["value"], abs=1e-6)
    assert len(found["reasons"]["similarity"]) == len(found["reasons"]["layers"]) == 3
    printed = capsys.readouterr().out
    assert "mIoU on validation" in printed and "train_runtime" not in printed
    report = (out / "search.md").read_text()
    assert str(tmp_path) not in report and f"{COUNTS['train']} training images" in report


@pytest.mark.slow
def test_a_broken_search_goes_on_and_ends_as_a_whole_one(encoder, tmp_path, monkeypatch):
    data, trained, real = data_folder(tmp_path / "data", "segmentation"), [], SearchTask.train

    def breaks(self, candidate, *rest):
        if len(trained) == 5:
            raise KeyboardInterrupt
        trained.append(candidate.name)
        return real(self, candidate, *rest)

    assert search(tmp_path / "whole", [encoder], data, "segmentation") == 0
    monkeypatch.setattr(SearchTask, "train", breaks)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "broken", [encoder], data, "segmentation")
    before, trained[:] = len(trained), []
    monkeypatch.setattr(SearchTask, "train", lambda *args: trained.append(args[1].name) or real(*args))
    assert search(tmp_path / "broken", [encoder], data, "segmentation") == 0
    whole, broken = found_in(tmp_path / "whole"), found_in(tmp_path / "broken")
    runs = sum(len(row["rounds"]) for row in whole["candidates"]) + len(whole["final"])
    assert before + len(trained) == runs
    assert whole["chosen"] == broken["chosen"] and whole["reasons"] == broken["reasons"]
    assert [row["rounds"] for row in whole["candidates"]] == [row["rounds"] for row in broken["candidates"]]
    assert [row["seeds"] for row in whole["final"]] == [row["seeds"] for row in broken["final"]]
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]
    trained.clear()
    assert search(tmp_path / "broken", [encoder], data, "segmentation") == 0 and not trained


@pytest.mark.slow
def test_what_is_beyond_the_budget_is_never_chosen(encoder, tmp_path, capsys):
    data, out = data_folder(tmp_path / "data", "segmentation"), tmp_path / "out"
    assert search(out, [encoder], data, "segmentation", "--budget-mib", "1e-6") == 2
    told = capsys.readouterr().err
    assert "the cheapest costs" in told and "mib (layer" in told and "allowed 1e-06" in told
    assert not (out / "features").exists() and not (out / "runs").exists()
    costs = {key.split(",")[0]: cost["mebibytes"] for key, cost in json.loads((out / "costs.json").read_text()).items()}
    limit = (costs["layer 3"] + costs["concat 1 2 3"]) / 2
    assert search(out, [encoder], data, "segmentation", "--budget-mib", str(limit)) == 0
    found = found_in(out)
    rows = {row["name"]: row for row in found["candidates"]}
    assert {name for name, row in rows.items() if row["rounds"]} == {n for n, cost in costs.items() if cost <= limit}
    assert rows[found["chosen"]]["mebibytes"] <= limit < rows["concat 1 2 3"]["mebibytes"]
    assert not rows["concat 1 2 3"]["within"] and "concat 1 2 3" in {row["name"] for row in found["final"]}
    costs = json.loads((out / "costs.json").read_text())
    cheapest = min(cost["milliseconds"] for cost in costs.values())
    assert search(out, [encoder], data, "segmentation", "--budget-ms", str(cheapest / 2)) == 2
    assert " ms (" in capsys.readouterr().err


@pytest.mark.slow
def test_depth(encoder, tmp_path):
    data, out = data_folder(tmp_path / "data", "depth"), tmp_path / "out"
    assert search(out, [encoder], data, "depth", "--budget-of", "whole", "--protocol", "nyu_eigen") == 0
    found = found_in(out)
    model = AutoModelForDepthEstimation.from_pretrained(out / "model").eval()
    dataset = DepthDataset.from_folder(f"{data}/val", AutoImageProcessor.from_pretrained(out / "model"))
    again = evaluate_depth(model, dataset, "nyu_eigen", progress=False)["abs_rel"]
    assert "depth under nyu_eigen" in found["facts"]["data"]
    assert found["lower_is_better"] and again == pytest.approx(found["final"][0]["value"], abs=1e-6)
    furthest = max(len(row["rounds"]) for row in found["candidates"])
    last = {row["name"]: row["rounds"] for row in found["candidates"] if len(row["rounds"]) == furthest}
    assert len(last) == 2 and found["chosen"] == min(last, key=lambda name: last[name][-1]["value"])
    assert all(row["gigaflops"] > 0 for row in found["candidates"])


@pytest.mark.slow
def test_several_encoders(encoder, tmp_path):
    other = encoder_folder(tmp_path, "convnext", 32, mean=0.4)
    data, out = data_folder(tmp_path / "data", "classification"), tmp_path / "out"
    assert search(out, [encoder, other], data, "classification", "--size", "32", "--layers", "middle_last") == 0
    found = found_in(out)
    names = [row["name"] for row in found["candidates"]]
    assert any(name.startswith("add of encoder 0 [3] and encoder 1 [") for name in names)
    assert any(name.startswith("layer of encoder 1 [") for name in names)
    model = AutoModelForImageClassification.from_pretrained(out / "model").eval()
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 3)


@pytest.mark.slow
def test_retrieval(encoder, tmp_path):
    out = tmp_path / "out"
    write_figures(tmp_path / "data", {"train": 12, "validation": 6})
    assert search(out, [encoder], str(tmp_path / "data"), "retrieval") == 0
    found = found_in(out)
    register()
    model = AutoModel.from_pretrained(out / "model").eval()
    processor = AutoProcessor.from_pretrained(out / "model")
    dataset = RetrievalDataset.from_source(tmp_path / "data", processor, "validation")
    again = evaluate_retrieval(model, dataset)["rsum"]
    assert again == pytest.approx(found["final"][0]["seeds"][0]["value"], abs=1e-6)
    runs, captions = len(list((out / "runs").iterdir())), tmp_path / "data" / "captions.jsonl"
    captions.write_text(captions.read_text().replace("red", "scarlet"))
    assert search(out, [encoder], str(tmp_path / "data"), "retrieval") == 0
    assert len(list((out / "runs").iterdir())) >= 2 * runs  # other texts of the same images are other runs


def test_wrong_questions_are_refused_before_anything_is_read(encoder, tmp_path, capsys):
    data = data_folder(tmp_path / "data", "segmentation")
    for more, told in (
        (["--fusions", "sum"], "'sum'"),
        (["--layers", "9,12"], "layers of one width"),
        (["--fusion-options", '{"film": {}}'], "film"),
        (["--budget-ms", "0"], "above zero"),
        (["--held-out", "1"], "held_out"),
        (["--train-images", "99"], "between 1 and 10 images"),
        (["--label-stride", "0"], "label_stride of 1 or more"),
        (["--first-steps", "0"], "first_steps=0"),
    ):
        assert search(tmp_path / "out", [encoder], data, "segmentation", *more) == 2
        assert told in capsys.readouterr().err
    assert search(tmp_path / "out", [encoder, encoder], data, "retrieval") == 2
    assert "one encoder for retrieval" in capsys.readouterr().err
    for more, told in ((["--train-images", "5"], "thin labelled images"), (["--size", "32", "48"], "square canvas")):
        assert search(tmp_path / "out", [encoder], data, "retrieval", *more) == 2
        assert told in capsys.readouterr().err


def test_a_missing_matplotlib_is_told_before_the_search(encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    data = data_folder(tmp_path / "data", "segmentation")
    assert (
        main(["search-fusion", encoder, "--data", data, "--task", "segmentation", "--out", str(tmp_path / "out")]) == 2
    )
    assert "vitweave[viz]" in capsys.readouterr().err and not (tmp_path / "out").exists()

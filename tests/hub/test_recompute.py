"""`vitweave verify` measures the metrics of a card again, on the data of the card and with no code or command of it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from modality_translators import tiny_generator
from retrieval_models import VISION, retriever
from tiny_modality_models import mit_fusion, stirred
from tiny_retriever import tiny_processor
from transformers import ViTImageProcessorPil

from vitweave.cli import main
from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.hub.card import CardInfo, CardMetric, build
from vitweave.hub.checksums import sha256, write_sums
from vitweave.hub.evaluations import ImageToImage, ModalitySegmentation
from vitweave.hub.export import export
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.modeling_depth import DensePredictorForDepthEstimation
from vitweave.modeling.modeling_modality_fusion import ModalityFusionForSemanticSegmentation
from vitweave.modeling.modeling_specialized_vit import SpecializedViTForImageClassification, SpecializedViTModel
from vitweave.processing.image_processing_pil_depth import DepthImageProcessorPil
from vitweave.processing.image_processing_pil_modality import ModalityImageProcessorPil
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
from vitweave.training.classification import train_classification
from vitweave.training.classification_data import ImageClassificationDataset
from vitweave.training.depth import train_depth
from vitweave.training.depth_data import DepthDataset
from vitweave.training.modality_data import ModalityDataset, ModalityFolder
from vitweave.training.modality_evaluation import evaluate_modalities
from vitweave.training.retrieval_data import RetrievalDataset
from vitweave.training.retrieval_evaluation import evaluate_retrieval
from vitweave.training.retrieval_records import open_records
from vitweave.training.segmentation import train_segmentation
from vitweave.training.segmentation_data import SegmentationDataset
from vitweave.training.synthetic_classes import SyntheticClasses
from vitweave.training.synthetic_figures import write_figures
from vitweave.training.synthetic_shapes import SyntheticDepth, SyntheticShapes
from vitweave.training.translation import train_translation
from vitweave.training.translation_data import TranslationDataset
from vitweave.training.translation_evaluation import evaluate_translation

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
SIZE = {"height": 32, "width": 32}
STEPS = {"max_steps": 3, "per_device_train_batch_size": 4, "disable_tqdm": True, "save_strategy": "steps"}
STEPS |= {"save_steps": 3, "dataloader_pin_memory": False}


def write_pairs(folder: Path, samples, map_folder: str) -> None:
    for index in range(len(samples)):
        sample = samples[index]
        for name, content in (("image", sample["image"]), (map_folder, sample[map_folder])):
            (folder / name).mkdir(parents=True, exist_ok=True)
            if isinstance(content, np.ndarray):
                np.save(folder / name / f"{index}.npy", content)
            else:
                content.save(folder / name / f"{index}.png")


# Models with the value that their own recipe measured: (model, processor, metric's facts) -----------------------------


def segmentation(data: Path, work: Path):
    write_pairs(data / "val", SyntheticShapes(6, seed=1), "label")
    backbone = SpecializedViTConfig(**TINY, out_indices=[1])
    model = DensePredictorForSemanticSegmentation(DensePredictorConfig(backbone_config=backbone, num_labels=3))
    processor = SegmentationImageProcessorPil(size=SIZE)
    parts = (SegmentationDataset(SyntheticShapes(length, seed=seed), processor) for length, seed in ((8, 0), (6, 1)))
    found = train_segmentation(model, *parts, processor, work, **STEPS)
    return model, processor, {"type": "mean_iou", "value": found["mean_iou"], "split": "val"}


def sensors(data: Path, work: Path):
    rng = np.random.default_rng(0)
    scenes = []
    for index in range(4):
        label, depth = rng.integers(0, 5, (32, 40), dtype=np.uint8), rng.random((32, 40)).astype(np.float32)
        rgb = rng.integers(0, 256, (32, 40, 3), dtype=np.uint8)
        for name, array in (("rgb", rgb), ("label", label)):
            (data / name).mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(array).save(data / name / f"{index}.png")
        (data / "depth").mkdir(exist_ok=True)
        np.save(data / "depth" / f"{index}.npy", depth)
        scenes.append({"images": {"rgb": rgb, "depth": depth}, "label": label})
    (data / "val.txt").write_text("1\n3\n")
    model = stirred(ModalityFusionForSemanticSegmentation(mit_fusion()))
    encodings = {"rgb": {"encoding": "rgb"}, "depth": {"encoding": "metres", "value_range": [0, 1]}}
    processor = ModalityImageProcessorPil(encodings)
    shown = ModalityDataset([scenes[1], scenes[3]], processor)
    value, other = (evaluate_modalities(model, shown, keep)["pixel_accuracy"] for keep in (["depth"], None))
    assert value != other
    return model, processor, {"type": "pixel_accuracy", "value": value, "split": "val", "options": {"keep": ["depth"]}}


def write_scenes(data: Path, count: int = 6) -> None:
    """Depth in millimetres, of which the first row was not measured, and its shades."""
    rng = np.random.default_rng(0)
    for name in ("shade", "depth"):
        (data / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        depth = rng.integers(1000, 9000, (4, 6), dtype=np.uint16).repeat(8, 0).repeat(8, 1)
        shade = np.repeat((255 - depth // 40).astype(np.uint8)[..., None], 3, axis=2)
        depth[0] = 0
        PIL.Image.fromarray(shade).save(data / "shade" / f"{index}.png")
        PIL.Image.fromarray(depth).save(data / "depth" / f"{index}.png")
    (data / "train.txt").write_text("0\n1\n2\n3\n")
    (data / "val.txt").write_text("4\n5\n")


DEPTH = {"encoding": "metres", "scale": 0.001, "invalid": 0, "value_range": [0, 10]}


def translation(data: Path, work: Path):
    write_scenes(data)
    processor = ModalityImageProcessorPil({"shade": {"encoding": "picture"}})

    def part(name: str, sensor=DEPTH) -> TranslationDataset:
        samples = ModalityFolder(data, ["shade", "depth"], label_folder=None, names=data / f"{name}.txt")
        return TranslationDataset(samples, processor, "depth", sensor)

    model = tiny_generator(["shade"], fusion_type=None)
    found = train_translation(model, part("train"), part("val"), processor, work, **STEPS)
    assert abs(evaluate_translation(model, part("val", DEPTH | {"scale": 5e-4}))["mae"] - found["mae"]) > 0.01
    options = {"target": "depth", "sensor": DEPTH}
    return model, processor, {"type": "mae", "value": found["mae"], "split": "val", "options": options}


def depth(data: Path, work: Path):
    write_pairs(data / "val", SyntheticDepth(4, seed=1), "depth")
    backbone = SpecializedViTConfig(**TINY, out_indices=[1], apply_layernorm=False)
    model = DensePredictorForDepthEstimation(DensePredictorConfig(backbone_config=backbone, max_depth=10.0))
    processor = DepthImageProcessorPil(size=SIZE, depth_scale=1.0)
    parts = (DepthDataset(SyntheticDepth(length, seed=seed), processor) for length, seed in ((8, 0), (4, 1)))
    found = train_depth(model, *parts, processor, work, "nyu", **STEPS)
    return (
        model,
        processor,
        {
            "type": "abs_rel",
            "value": found["nyu_abs_rel"],
            "split": "val",
            "options": {"protocol": "nyu"},
        },
    )


def classification(data: Path, work: Path):
    pictures = SyntheticClasses(9, seed=1)
    for index, sample in enumerate(pictures[i] for i in range(len(pictures))):
        folder = data / "validation" / pictures.id2label[sample["label"]]
        folder.mkdir(parents=True, exist_ok=True)
        sample["image"].save(folder / f"{index}.png")
    names = {name: index for index, name in pictures.id2label.items()}
    config = SpecializedViTConfig(**TINY, id2label=dict(pictures.id2label), label2id=names)
    model, processor = SpecializedViTForImageClassification(config), ViTImageProcessorPil(size=SIZE)
    parts = (ImageClassificationDataset(source, processor) for source in (SyntheticClasses(12), pictures))
    found = train_classification(model, *parts, processor, work, **STEPS)
    return model, processor, {"type": "accuracy", "value": found["accuracy"], "split": "validation"}


def retrieval(data: Path, work: Path):
    write_figures(data, {"train": 4, "validation": 8})
    processor = tiny_processor([record["caption"] for record in open_records(data)], size=32)
    model = retriever(text={"vocab_size": len(processor.tokenizer), "max_position_embeddings": 48}).eval()
    found = evaluate_retrieval(model, RetrievalDataset(open_records(data, "validation"), processor))
    return model, processor, {"type": "text_to_image_mrr", "value": found["text_to_image_mrr"], "split": "validation"}


KINDS = {kind.__name__: kind for kind in (segmentation, sensors, translation, depth, classification, retrieval)}


def publish(kind, folder: Path) -> Path:
    """`export/` with its card, and `data/`, below `folder`."""
    torch.manual_seed(0)
    model, processor, facts = kind(folder / "data", folder / "run")
    metric = CardMetric(**facts, command="touch ran", dataset="some data")
    card = CardInfo(metrics=[metric], data_sha256={"some data": sha256(folder / "data")})
    return export(model, folder / "export", processor, card, verify=False)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    publish(segmentation, folder)
    return folder


@pytest.fixture
def published(original, tmp_path, monkeypatch) -> Path:
    """A copy to be changed; it is the working directory, too, where a command of the card would leave `ran`."""
    monkeypatch.chdir(shutil.copytree(original, tmp_path / "copy"))
    yield tmp_path / "copy"
    assert not list(tmp_path.rglob("ran"))


def edit_card(published: Path, **changes) -> None:
    """Change the metric, and the sums with it, as a forger would."""
    path = published / "export" / "vitweave_card.json"
    card = json.loads(path.read_text())
    card["metrics"] = [metric | changes for metric in card["metrics"]]
    path.write_text(json.dumps(card))
    write_sums(published / "export")


def verify(*more: str) -> int:
    return main(["verify", "export", "--data", "some data=data", *more])


# What agrees, and what does not ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in ("depth", "retrieval"))) for k in KINDS]
)
def test_the_value_of_the_recipe_comes_out_again(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish(KINDS[kind], tmp_path)
    capsys.readouterr()
    assert verify("--tolerance", "1e-6") == 0
    told = capsys.readouterr().out
    assert "files as published" in told and "some data: data as published" in told
    assert ", recomputed 0." in told and "not recomputed" not in told
    edit_card(tmp_path, value=CardInfo.load(tmp_path / "export").metrics[0].value + 0.02)
    assert verify() == 2 and "1 metrics differ by more than 0.005" in capsys.readouterr().err


def test_a_changed_value_fails(published, capsys):
    value = CardInfo.load(published / "export").metrics[0].value
    edit_card(published, value=value + 0.02)
    assert verify() == 2
    out, err = capsys.readouterr()
    assert "difference -0.02" in out and "1 metrics differ by more than 0.005: mean_iou on some data, val" in err
    assert verify("--tolerance", "0.03") == 0
    edit_card(published, value=value + 0.02)
    card = published / "export" / "vitweave_card.json"
    card.write_text(card.read_text().replace("touch", "rm"))
    assert verify() == 2 and "changed ['vitweave_card.json']" in capsys.readouterr().err


def test_changed_weights_fail_although_the_sums_were_made_anew(published, capsys):
    backbone = SpecializedViTConfig(**TINY, out_indices=[1])
    model = DensePredictorForSemanticSegmentation(DensePredictorConfig(backbone_config=backbone, num_labels=3))
    stirred(model).save_pretrained(published / "other")
    shutil.copy(published / "other" / "model.safetensors", published / "export" / "model.safetensors")
    write_sums(published / "export")
    assert verify() == 2 and "1 metrics differ" in capsys.readouterr().err


def test_other_data_are_refused_before_anything_is_measured(published, capsys):
    (published / "data" / "val" / "image" / "0.png").unlink()
    (published / "data" / "val" / "label" / "0.png").unlink()
    assert verify() == 2
    out, err = capsys.readouterr()
    assert "data is another data set than 'some data' of the card: SHA-256" in err and "recomputed" not in out


def test_data_are_named_as_on_the_card(published, capsys):
    assert main(["verify", "export", "--data", "cells=data"]) == 2
    assert "no metric on data named 'cells'; it has ['some data']" in capsys.readouterr().err
    assert main(["verify", "export", "--data", "some data=absent"]) == 2
    assert "there is nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["verify", "export", "--data", "data"])
    assert "expected NAME=PATH" in capsys.readouterr().err


def test_windows_of_a_card_are_those_of_the_evaluation(published, capsys):
    edit_card(published, options={"window": 16, "stride": 8})
    assert verify("--tolerance", "1") == 0
    assert "difference +0\n" not in capsys.readouterr().out
    edit_card(published, options={"window": 32})
    assert verify("--tolerance", "1e-6") == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dataset": "other data"}, "its data were not given, --data other data=PATH"),
        ({"split": None}, "the card names no part of the data"),
        ({"options": None}, "the card says that only the command measures it"),
        ({"type": "accuracy"}, "its evaluation gives other metrics: mean_iou, pixel_accuracy"),
    ],
)
def test_what_cannot_be_measured_is_listed_with_its_command(published, capsys, changes, reason):
    card = CardInfo.load(published / "export")
    first, again = (CardMetric(**vars(card.metrics[0])) for _ in range(2))
    card.metrics = [first, CardMetric(**vars(again) | changes | {"value": 0.5})]
    card.save(published / "export")
    write_sums(published / "export")
    assert verify() == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert "recomputed 0." in first
    assert f"not recomputed: {reason}" in second and second.endswith("by its author: touch ran")


def test_values_of_several_models_are_listed(published, capsys):
    card = CardInfo.load(published / "export")
    card.metrics = [CardMetric(**vars(card.metrics[0]) | {"value": value}) for value in (0.1, 0.2)]
    card.save(published / "export")
    write_sums(published / "export")
    assert verify() == 0
    assert capsys.readouterr().out.count("the card has several values of it") == 2


def test_a_model_without_an_evaluation_is_told(published, capsys):
    model = SpecializedViTModel(SpecializedViTConfig(**VISION))
    card = CardInfo.load(published / "export")
    export(model, published / "export", SegmentationImageProcessorPil(), card, verify=False, overwrite=True)
    assert verify() == 0
    assert "not recomputed: there is no evaluation of a SpecializedViTModel" in capsys.readouterr().out


# Hostile cards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"value": float("nan")}, "needs a number that was measured, got nan"),
        ({"value": 10**400}, "needs a number that was measured"),
        ({"value": "0.5"}, "Validation error for field 'value'"),
        ({"value": None}, "Validation error for field 'value'"),
        ({"command": ["rm", "-rf"]}, "Validation error for field 'command'"),
        ({"dataset": {"some data": 1}}, "Validation error for field 'dataset'"),
        ({"split": 3}, "Validation error for field 'split'"),
        ({"options": ["window"]}, "Validation error for field 'options'"),
        ({"options": {"code": "import os"}}, "unknown keys ['code']"),
        ({"options": {"window": "32; touch ran"}}, "Validation error for field 'window'"),
        ({"options": {"window": True}}, "Validation error for field 'window'"),
        ({"options": {"window": -4}}, "1 to 16384 pixels as window, got -4"),
        ({"options": {"window": 10**9}}, "1 to 16384 pixels as window"),
        ({"options": {"window": 8, "stride": 9}}, "expected 0 < stride <= window"),
    ],
)
def test_wrong_types_and_values_are_clean_errors(published, capsys, changes, reason):
    edit_card(published, **changes)
    assert verify() == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ") and reason in line


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "unknown keys [], missing ['sensor', 'target']"),
        ({"target": "depth"}, "missing ['sensor']"),
        ({"target": "depth", "sensor": DEPTH, "keep": ["shade"]}, "unknown keys ['keep']"),
        ({"target": ["depth"], "sensor": DEPTH}, "Validation error for field 'target'"),
        ({"target": "../secret", "sensor": DEPTH}, "expected names of letters, digits, _ and -"),
        ({"target": "", "sensor": DEPTH}, "expected names of letters, digits, _ and -"),
        ({"target": "depth", "sensor": "metres"}, "Validation error for field 'sensor'"),
        ({"target": "depth", "sensor": {}}, "the modality 'depth' has no encoding"),
        ({"target": "depth", "sensor": {"encoding": "metres"}}, "expected value_range=(lowest, highest)"),
        ({"target": "depth", "sensor": DEPTH | {"encoding": "feet"}}, "unknown encoding 'feet'"),
        ({"target": "depth", "sensor": DEPTH | {"scale": "0.001"}}, "expected scale to be float, got '0.001'"),
        ({"target": "depth", "sensor": DEPTH | {"value_range": ["a", "b"]}}, "expected value_range to be"),
        ({"target": "depth", "sensor": DEPTH | {"range": [0, 10]}}, "has no option ['range']"),
    ],
)
def test_a_drawn_sensor_is_told_without_gaps(changes, reason):
    metric = CardMetric("mae", 0.1, "touch ran", "scenes", split="val", options=changes)
    with pytest.raises(ValueError) as found:
        build(ImageToImage, metric.options, "options of metric 'mae'")
    assert reason in str(found.value)


@pytest.mark.parametrize("evaluation", [ImageToImage("depth", DEPTH), ModalitySegmentation()])
def test_no_sensor_of_a_processor_leads_out_of_the_data(evaluation, tmp_path):
    write_scenes(tmp_path / "data")
    write_scenes(tmp_path / "secret")
    processor = ModalityImageProcessorPil({"../secret/shade": {"encoding": "picture"}})
    with pytest.raises(ValueError, match="letters, digits, _ and - for the folders"):
        evaluation(None, processor, tmp_path / "data", "val")


@pytest.mark.parametrize("field", ["metrics", "data_sha256", "tags"])
def test_other_fields_have_their_types(published, capsys, field):
    path = published / "export" / "vitweave_card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: {"some data": 5}}))
    write_sums(published / "export")
    assert verify() == 2
    assert field in capsys.readouterr().err


@pytest.mark.parametrize("place", ["../secret", "/etc", "..", "a/b", "val\x00"])
def test_no_name_of_a_card_leads_out_of_the_data(published, capsys, place):
    write_pairs(published / "secret", SyntheticShapes(2), "label")
    edit_card(published, split=place)
    assert verify() == 0
    assert "the card names no part of the data, but" in capsys.readouterr().out
    edit_card(published, dataset=place, split="val")
    assert main(["verify", "export"]) == 0
    assert "its data were not given" in capsys.readouterr().out


def test_commands_are_text(published, capsys):
    edit_card(published, command="$(touch ran); `touch ran` && touch ran\n\x1b[2Jtouch ran", dataset="x\x1b]0;y\x07")
    assert main(["verify", "export"]) == 0
    out = capsys.readouterr().out
    assert "by its author: $(touch ran); `touch ran` && touch ran [2Jtouch ran\n" in out
    assert "\x1b" not in out and "\x07" not in out


# A page alone ---------------------------------------------------------------------------------------------------------


def test_a_page_lists_its_metrics_and_that_there_is_no_model(published, capsys):
    edit_card(published, command="touch ran | tee log")
    card = CardInfo.load(published / "export")
    card.training_command = "touch ran --train"
    model = SpecializedViTModel(SpecializedViTConfig(**VISION))
    export(model, published / "page", card=card, verify=False)
    shutil.copy(published / "page" / "README.md", published / "CARD.md")
    assert main(["verify", "CARD.md"]) == 0
    head, metric, training = capsys.readouterr().out.splitlines()
    assert "there is no model to evaluate" in head and training == "touch ran --train"
    assert metric == f"mean_iou on some data, val: {card.metrics[0].value:.4g}, by touch ran | tee log"


def test_every_model_card_has_its_commands(capsys):
    pages = sorted((Path(__file__).parents[2] / "model_cards").glob("*.md"))
    assert pages
    for page in pages:
        assert main(["verify", str(page)]) == 0
        _, *lines = capsys.readouterr().out.splitlines()
        commands = [line for line in lines if line.startswith(("python ", "vitweave ", "make "))]
        assert commands and len(lines) > len(commands), page  # and figures
        assert not [line for line in lines if re.search(r" \\ |(python|vitweave) .* (python|vitweave) ", line)], page


def test_tables_and_commands_written_by_hand(tmp_path, capsys):
    (tmp_path / "page.md").write_text(
        "# Page\n\n```bash\nfirst --a 1 \\\n    --b 2\n\nsecond\n```\n\n"
        "| fact | value |\n| --- | --- |\n| size | 3 |\n\n"
        "| fusion | RSUM | seeds 0, 1 | |\n| --- | ---: | ---: | --- |\n| `concat` | **103.6** | 1.5, 2.5 | |\n"
        "| $TASK | `--size 3` | | |\n\n```python\n| a | b |\n|---|---|\n| c | 1 |\n```\n\n"
        "| metric | dataset | split | value | recompute with |\n| - | - | - | - | - |\n"
        "| mIoU | x | val | 0.5 | `a \\| b` |"
    )
    assert main(["verify", str(tmp_path / "page.md")]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "mIoU on x, val: 0.5, by a | b",
        "concat: RSUM = 103.6; seeds 0, 1 = 1.5, 2.5",
        "first --a 1 --b 2",
        "second",
    ]


def test_what_is_neither_folder_nor_page_is_told(tmp_path, capsys):
    (tmp_path / "page.md").write_bytes(b"\xff\xfe| a |")
    for name in ("absent.md", "page.md", "absent"):
        assert main(["verify", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.startswith("error: ")

"""The retriever, the figure processor, the data and the commands together."""

import pytest
import torch
from retrieval_models import VISION, retriever
from tiny_retriever import tiny_processor
from transformers import pipeline

from vitweave.cli import main
from vitweave.modeling.image_text_embeddings import ImageEmbeddings, TextEmbeddings
from vitweave.training.heat_maps import sentence_heat_maps
from vitweave.training.pointing import pointing_test
from vitweave.training.retrieval_data import RetrievalCollator, RetrievalDataset
from vitweave.training.retrieval_evaluation import embed_dataset, evaluate_retrieval, model_ranking
from vitweave.training.retrieval_metrics import retrieval_ranks
from vitweave.training.synthetic_figures import SyntheticFigures

FIGURES = SyntheticFigures(9)


@pytest.fixture(scope="module")
def dataset():
    captions = [FIGURES.fields(index)["caption"] for index in range(len(FIGURES))]
    return RetrievalDataset(FIGURES, tiny_processor(captions, VISION["image_size"], VISION["patch_size"]))


@pytest.fixture(scope="module")
def model(dataset):
    size = {"vocab_size": len(dataset.processor.tokenizer), "max_position_embeddings": 48}
    return retriever(text=size, tile_levels=[1, 2, 4]).eval()


def test_a_batch_trains_it(model, dataset):
    batch = RetrievalCollator(dataset.processor.tokenizer)([dataset[index] for index in range(5)])
    model.train()
    model(**batch).loss.backward()
    model.eval()
    idle = [
        name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.isfinite().all()
    ]
    assert not idle


def test_the_combined_ranks_are_those_of_the_models_own_scores(model, dataset):
    images, texts = embed_dataset(model, dataset, batch_size=4)
    seen = ImageEmbeddings(images.pooled, images.parts, images.part_mask)
    scores = model.ranking_scores(seen, TextEmbeddings(texts.pooled, texts.parts, texts.part_mask))
    ranks = retrieval_ranks(images, texts, model_ranking(model))
    assert ranks["image_to_text"].tolist() == (1 + (scores > scores.diag()[:, None]).sum(1)).tolist()
    assert ranks["text_to_image"].tolist() == (1 + (scores > scores.diag()).sum(0)).tolist()
    assert "combined_rsum" in evaluate_retrieval(model, dataset, resamples=5)


def test_it_points_and_its_sentences_have_heat(model, dataset):
    metrics = pointing_test(model, dataset, resamples=5)
    assert metrics["mosaics"] == 2 and metrics["sentences"] == 16 and metrics["pointing_chance"] == 0.25
    maps, boxes = sentence_heat_maps(model, dataset.processor, FIGURES[0]["image"], FIGURES[0]["sentences"])
    assert maps.shape == (2, 32, 64) and maps.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all()


def test_saved_it_serves_the_pipeline_and_the_commands(model, dataset, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    dataset.processor.save_pretrained(tmp_path / "model")
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path / "model"), device="cpu")
    labels = [FIGURES.fields(index)["caption"] for index in range(3)]
    found = classify(FIGURES[1]["image"], candidate_labels=labels, hypothesis_template="{}")
    batch = dataset.processor([FIGURES[1]["image"]], labels, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch, return_loss=False).logits_per_image.softmax(-1)[0]
    scores = {answer["label"]: answer["score"] for answer in found}
    torch.testing.assert_close(torch.tensor([scores[label] for label in labels]), expected, atol=1e-4, rtol=0)
    (tmp_path / "figures").mkdir()
    for index in range(4):
        FIGURES[index]["image"].save(tmp_path / "figures" / f"{index}.png")
    out = str(tmp_path / "out")
    assert main(["index", str(tmp_path / "model"), str(tmp_path / "figures"), out, "--device", "cpu"]) == 0
    assert main(["search", out, labels[0], "--top", "4", "--sheet", str(tmp_path / "sheet.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[2] for line in lines[-5:-1]) == [f"{index}.png" for index in range(4)]

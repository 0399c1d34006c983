"""A dataset through a dual encoder: batches change nothing, right answers are found, stock models work."""

import pytest
import torch
from tiny_retriever import TinyRetriever, tiny_dataset, tiny_processor
from transformers import BertConfig, BertModel, VisionTextDualEncoderModel, ViTConfig, ViTModel

from vitweave.training.retrieval_data import RetrievalDataset
from vitweave.training.retrieval_evaluation import best_alpha, embed_dataset, evaluate_retrieval, record_groups
from vitweave.training.retrieval_ranking import GallerySide
from vitweave.training.synthetic_figures import SyntheticFigures


def records(texts, size=12):
    figures = SyntheticFigures(len(texts))
    return [{"id": str(i), "image": figures[i]["image"], "caption": text} for i, text in enumerate(texts)]


def test_batches_change_nothing_and_the_mode_comes_back():
    model, dataset = TinyRetriever().train(), tiny_dataset(7)
    whole, parts = (embed_dataset(model, dataset, batch_size=size) for size in (7, 2))
    assert model.training
    for one, other in zip(whole, parts, strict=True):
        for name in ("pooled", "groups", "parts", "part_mask"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name))
    assert whole[0].parts.shape == (7, 20, 8) and whole[1].part_mask.shape == (7, 2)


def test_metrics_with_and_without_alignment():
    dataset = tiny_dataset(7)
    metrics = evaluate_retrieval(TinyRetriever(), dataset, resamples=20)
    assert metrics["images"] == metrics["texts"] == 7 and 0 <= metrics["rsum"] <= 6
    assert {"combined_rsum", "combined_text_to_image_R@1_high", "image_to_text_median_rank"} <= set(metrics)
    plain = evaluate_retrieval(TinyRetriever(alignment=False), dataset, resamples=20)
    assert not any(name.startswith("combined") for name in plain)
    same = evaluate_retrieval(TinyRetriever(), dataset, resamples=20, alpha=1.0)
    assert same["combined_rsum"] == same["rsum"] == plain["rsum"]


def test_equal_texts_and_several_texts_belong_together():
    texts = ["A wave.", "A spring.", "A wave.", ["A disc.", "A spring."], "A curve."]
    dataset = RetrievalDataset(records(texts), tiny_processor(["A wave."]))
    groups = record_groups(dataset)
    assert groups[0] == groups[2] and groups[1] == groups[3] and len(set(groups.tolist())) == 3
    images, captions = embed_dataset(TinyRetriever(), dataset)
    assert len(images.groups) == 5 and len(captions.groups) == 6
    assert captions.groups.tolist() == groups[[0, 1, 2, 3, 3, 4]].tolist()


def test_a_stock_dual_encoder_is_evaluated_too():
    dataset = tiny_dataset(4)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = ViTModel(ViTConfig(**small, image_size=64, patch_size=16))
    text = BertModel(BertConfig(**small, vocab_size=300))
    model = VisionTextDualEncoderModel(vision_model=vision, text_model=text)
    images, texts = embed_dataset(model, dataset)
    torch.testing.assert_close(images.pooled.norm(dim=1), torch.ones(4))
    assert texts.pooled.shape == images.pooled.shape and images.parts is None


def test_alpha_is_chosen_by_what_ranks_best():
    generator = torch.Generator().manual_seed(0)
    good = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=-1)
    noise = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=-1)
    mask, groups = torch.ones(12, 1, dtype=torch.bool), torch.arange(12)
    local_is_right = [GallerySide(side, groups, good[:, None], mask) for side in (noise, noise.flip(0))]
    global_is_right = [GallerySide(good, groups, side[:, None], mask) for side in (noise, noise.flip(0))]
    assert best_alpha(*local_is_right, temperature=0.0) < 0.5 and best_alpha(*global_is_right, temperature=0.0) == 1.0


def test_a_record_that_fails_is_named():
    dataset = tiny_dataset(3)
    dataset.picture = lambda index: torch.zeros(4, 8, 8)
    with pytest.raises(ValueError, match="figure 0: expected 3 channels"):
        dataset[0]

"""Ranks and their metrics: a brute-force computation, ties, several right answers, memory."""

import json

import pytest
import torch
import torch.nn.functional as F

from vitweave.training.retrieval_metrics import rank_metrics, retrieval_metrics, retrieval_ranks
from vitweave.training.retrieval_ranking import CombinedRanking, GallerySide, best_tile_scores, global_ranks

DIRECTIONS = ("image_to_text", "text_to_image")


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def sides(images, texts, groups=None, **parts):
    image_groups = torch.arange(len(images)) if groups is None else groups[0]
    text_groups = torch.arange(len(texts)) if groups is None else groups[1]
    tiles, sentences = parts.get("tiles", (None, None)), parts.get("sentences", (None, None))
    return GallerySide(images, image_groups, *tiles), GallerySide(texts, text_groups, *sentences)


def brute_force(scores, right):
    """Rank by the definition: one plus the wrong answers at least as good as the best right one."""
    ranks = []
    for row, answers in zip(scores, right, strict=True):
        best = row[answers].max()
        ranks.append(1 + int((row[~answers] >= best - 1e-12).sum()))
    return torch.tensor(ranks)


@pytest.mark.parametrize("block_size", [1, 3, 1000])
def test_blocks_give_what_the_whole_matrix_gives(block_size):
    images, texts = unit(9, 6), unit(21, 6, seed=1)
    groups = torch.arange(9) // 2, torch.arange(21) % 5  # several images and several texts of one group
    ranks = retrieval_ranks(*sides(images, texts, groups), block_size=block_size)
    right = groups[0][:, None] == groups[1]
    assert torch.equal(ranks["image_to_text"], brute_force(images @ texts.T, right))
    assert torch.equal(ranks["text_to_image"], brute_force(texts @ images.T, right.T))


def test_a_collapsed_model_is_last():
    same = unit(1, 50).float().expand(37, 50)
    metrics = retrieval_metrics(*sides(same, same), resamples=0, block_size=10)
    for way in DIRECTIONS:
        assert metrics[f"{way}_mean_rank"] == metrics[f"{way}_median_rank"] == 37 and metrics[f"{way}_R@10"] == 0


def test_a_perfect_model_is_first():
    images = unit(30, 16)
    metrics = retrieval_metrics(
        *sides(images, images.flip(0), (torch.arange(30), torch.arange(30).flip(0))), resamples=9
    )
    assert metrics["rsum"] == metrics["rsum_low"] == 6 and metrics["text_to_image_mrr"] == 1


def test_the_median_is_open_clips():
    assert rank_metrics(torch.tensor([1, 2, 3, 10]))["median_rank"] == 2  # zero-based 0 1 2 9: floor(1.5) + 1
    assert rank_metrics(torch.tensor([1, 4, 4]))["median_rank"] == 4
    metrics = rank_metrics(torch.tensor([1, 5, 6, 11]))
    assert (metrics["R@1"], metrics["R@5"], metrics["R@10"]) == (0.25, 0.5, 0.75)
    assert metrics["mrr"] == pytest.approx((1 + 1 / 5 + 1 / 6 + 1 / 11) / 4)


def test_the_interval_covers_and_is_seeded():
    images = unit(60, 8)
    texts = F.normalize(images + 0.8 * unit(60, 8, seed=1), dim=-1)
    first, second, other = (retrieval_metrics(*sides(images, texts), resamples=300, seed=seed) for seed in (3, 3, 4))
    assert first == second and first != other
    for name in ("rsum", "image_to_text_R@1", "text_to_image_mrr"):
        assert first[f"{name}_low"] < first[name] < first[f"{name}_high"]
    share = first["image_to_text_R@1"]
    expected = 2 * 1.96 * (share * (1 - share) / 60) ** 0.5
    assert first["image_to_text_R@1_high"] - first["image_to_text_R@1_low"] == pytest.approx(expected, rel=0.3)


def with_parts(count=14, hidden=6):
    images, texts = unit(count, hidden), unit(count, hidden, seed=1)
    generator = torch.Generator().manual_seed(2)
    tile_mask = torch.rand(count, 5, generator=generator) > 0.3
    sentence_mask = torch.rand(count, 3, generator=generator) > 0.4
    tile_mask[:, 0] = True
    sentence_mask[0] = False
    tiles, sentences = (unit(count, 5, hidden, seed=3), tile_mask), (unit(count, 3, hidden, seed=4), sentence_mask)
    return sides(images, texts, tiles=tiles, sentences=sentences)


def combined_matrix(images, texts, alpha, temperature):
    """(images, texts), pair by pair."""
    scores = images.pooled @ texts.pooled.T
    for i in range(len(images.pooled)):
        for t in range(len(texts.pooled)):
            found, asked = images.parts[i][images.part_mask[i]], texts.parts[t][texts.part_mask[t]]
            if len(asked):
                cosines = asked @ found.T
                best = temperature * torch.logsumexp(cosines / temperature, 1) if temperature else cosines.amax(1)
                scores[i, t] = alpha * scores[i, t] + (1 - alpha) * best.mean()
    return scores


@pytest.mark.parametrize("temperature", [0.0, 0.05])
def test_a_shortlist_of_everything_ranks_by_the_combined_score(temperature):
    images, texts = with_parts()
    ranks = retrieval_ranks(images, texts, CombinedRanking(0.4, temperature, shortlist=100), block_size=4)
    scores, right = combined_matrix(images, texts, 0.4, temperature), torch.eye(14, dtype=torch.bool)
    assert torch.equal(ranks["image_to_text"], brute_force(scores, right))
    assert torch.equal(ranks["text_to_image"], brute_force(scores.T, right))


def test_a_short_shortlist_reorders_only_itself():
    images, texts = with_parts()
    plain = retrieval_ranks(images, texts)
    ranks = retrieval_ranks(images, texts, CombinedRanking(0.1, 0.0, shortlist=4))
    for way in DIRECTIONS:
        behind = plain[way] > 4
        assert behind.any() and torch.equal(ranks[way][behind], plain[way][behind])
        assert (ranks[way][~behind] <= 4).all() and not torch.equal(ranks[way], plain[way])
    cosine_alone = retrieval_ranks(images, texts, CombinedRanking(1.0, 0.0, shortlist=4))
    assert all(torch.equal(cosine_alone[way], plain[way]) for way in DIRECTIONS)


def test_masked_tiles_and_sentences_count_nowhere():
    images, texts = with_parts()
    before = best_tile_scores(images.parts, images.part_mask, texts.parts, texts.part_mask, 0.05)
    images.parts[~images.part_mask], texts.parts[~texts.part_mask] = 9.0, 9.0
    after = best_tile_scores(images.parts, images.part_mask, texts.parts, texts.part_mask, 0.05)
    assert torch.equal(before, after) and before[0] == 0


def test_no_block_is_larger_than_asked(monkeypatch):
    largest, matmul = [0], torch.Tensor.__matmul__

    def counting(first, second):
        product = matmul(first, second)
        largest[0] = max(largest[0], product.numel())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", counting)
    global_ranks(*sides(unit(200, 4), unit(200, 4, seed=1)), block_size=16)
    assert largest[0] == 16 * 16


def test_bad_input_is_refused():
    broken = unit(4, 3)
    broken[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"1 embeddings are not finite, among them number \[2\]"):
        sides(broken, unit(4, 3))
    with pytest.raises(ValueError, match="1 of 4 queries have no right answer"):
        retrieval_metrics(*sides(unit(4, 3), unit(3, 3)))
    with pytest.raises(ValueError, match="got none"):
        sides(unit(0, 3), unit(3, 3))
    with pytest.raises(ValueError, match="tiles of the images"):
        retrieval_metrics(*sides(unit(4, 3), unit(4, 3)), ranking=CombinedRanking(0.5, 0.05))
    with pytest.raises(ValueError, match=r"alpha in 0\.\.1"):
        CombinedRanking(1.5, 0.05)
    assert json.dumps(retrieval_metrics(*sides(unit(4, 3), unit(4, 3)), resamples=5))

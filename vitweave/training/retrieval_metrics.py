"""Recall, reciprocal rank and rank of images found by text and texts found by image, with bootstrap intervals."""

import math

import torch
from torch import Tensor

from vitweave.training.retrieval_ranking import CombinedRanking, GallerySide, combined_ranks, global_ranks

CUTOFFS = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")


def rank_metrics(ranks: Tensor) -> dict[str, float]:
    """Metrics of ranks (queries,) that start at 1.

    Returns:
        R@1, R@5, R@10 and mrr as shares of 1, mean_rank, median_rank (floor of the median zero-based rank, plus 1: the
        rule of open_clip).
    """
    exact = ranks.double()
    metrics = {f"R@{cutoff}": (ranks <= cutoff).double().mean().item() for cutoff in CUTOFFS}
    metrics["mrr"] = (1 / exact).mean().item()
    metrics["mean_rank"] = exact.mean().item()
    metrics["median_rank"] = float((exact - 1).quantile(0.5).floor().item() + 1)
    return metrics


def retrieval_ranks(
    images: GallerySide, texts: GallerySide, ranking: CombinedRanking | None = None, block_size: int = 1024
) -> dict[str, Tensor]:
    """Ranks of the first right answer: `image_to_text` (images,), `text_to_image` (texts,)."""
    sides = {"image_to_text": (images, texts), "text_to_image": (texts, images)}
    if ranking is None:
        return {name: global_ranks(*pair, block_size) for name, pair in sides.items()}
    return {name: combined_ranks(*pair, ranking, name == "text_to_image", block_size) for name, pair in sides.items()}


def retrieval_metrics(
    images: GallerySide,
    texts: GallerySide,
    ranking: CombinedRanking | None = None,
    resamples: int = 1000,
    seed: int = 0,
    block_size: int = 1024,
) -> dict[str, float]:
    """Both directions of retrieval in one gallery.

    Memory grows with the number of embeddings, never with the number of pairs.

    Args:
        ranking: order the shortlist by tiles and sentences too; None ranks by the cosine.
        resamples: of the bootstrap; 0 leaves the intervals out.

    Returns:
        `image_to_text_R@1` and so on (see `rank_metrics`), `rsum`, the sum of the six recalls (0 to 6), and for
        recalls, mrr and rsum `<name>_low`, `<name>_high`: the 95 % interval over resampled groups of images and texts
        that belong together. `images` and `texts` count the gallery.
    """
    ranks = retrieval_ranks(images, texts, ranking, block_size)
    metrics = {f"{way}_{name}": value for way in DIRECTIONS for name, value in rank_metrics(ranks[way]).items()}
    metrics["rsum"] = sum(metrics[f"{way}_R@{cutoff}"] for way in DIRECTIONS for cutoff in CUTOFFS)
    metrics |= {"images": float(len(images.groups)), "texts": float(len(texts.groups))}
    if resamples:
        groups = {"image_to_text": images.groups, "text_to_image": texts.groups}
        metrics |= bootstrap_intervals(ranks, groups, resamples, seed)
    return metrics


def bootstrap_intervals(
    ranks: dict[str, Tensor], groups: dict[str, Tensor], resamples: int, seed: int
) -> dict[str, float]:
    """95 % intervals of the metrics in `bootstrap_samples`, as `<name>_low` and `<name>_high`."""
    intervals = {name: interval(sample) for name, sample in bootstrap_samples(ranks, groups, resamples, seed).items()}
    return {f"{name}_{end}": pair[i] for name, pair in intervals.items() for i, end in enumerate(("low", "high"))}


def interval(samples: Tensor) -> tuple[float, float]:
    """What 95 % of the samples lie between; NaN where none is a number."""
    edges, finite = torch.tensor([0.025, 0.975], dtype=torch.float64), samples[samples.isfinite()]
    low, high = finite.quantile(edges).tolist() if len(finite) else (math.nan, math.nan)
    return low, high


def bootstrap_samples(
    ranks: dict[str, Tensor], groups: dict[str, Tensor], resamples: int, seed: int
) -> dict[str, Tensor]:
    """Recalls, mrr and rsum of resampled queries, (resamples,) each.

    Groups are drawn with replacement, both directions and all texts of an image together. The gallery stays whole; what
    varies is which queries were asked. The same seed draws the same groups, so that two models can be compared pair by
    pair.

    Args:
        ranks, groups: (queries,) of each direction.
    """
    values = {way: query_values(ranks[way].cpu()) for way in DIRECTIONS}
    known = torch.unique(torch.cat([groups[way].cpu() for way in DIRECTIONS]))
    sums, counts = {}, {}
    for way in DIRECTIONS:
        position = torch.searchsorted(known, groups[way].cpu())
        sums[way] = torch.zeros(len(known), len(CUTOFFS) + 1, dtype=torch.float64).index_add_(0, position, values[way])
        counts[way] = torch.bincount(position, minlength=len(known)).double()
    generator = torch.Generator().manual_seed(seed)
    drawn = {way: [] for way in DIRECTIONS}
    for _ in range(resamples):
        picks = torch.randint(len(known), (len(known),), generator=generator)
        weights = torch.bincount(picks, minlength=len(known)).double()
        for way in DIRECTIONS:
            drawn[way].append(weights @ sums[way] / (weights @ counts[way]))
    samples = {}
    for way in DIRECTIONS:
        columns = torch.stack(drawn[way]).T
        names = [*(f"R@{cutoff}" for cutoff in CUTOFFS), "mrr"]
        samples |= {f"{way}_{name}": column for name, column in zip(names, columns, strict=True)}
    samples["rsum"] = sum(samples[f"{way}_R@{cutoff}"] for way in DIRECTIONS for cutoff in CUTOFFS)
    return samples


def query_values(ranks: Tensor) -> Tensor:
    """What each query adds to the recalls and to mrr: (queries, 4)."""
    hits = [(ranks <= cutoff).double() for cutoff in CUTOFFS]
    return torch.stack([*hits, 1 / ranks.double()], dim=1)

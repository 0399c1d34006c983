"""Ranks of the right answers in a gallery, block by block: the whole similarity matrix is never in memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Cosines are computed in float64; what is closer than this counts as a tie (equal vectors can differ by a rounding).
TIE = 1e-12


@dataclass
class GallerySide:
    """The embeddings of all images, or of all texts, of an evaluation.

    Args:
        pooled: (items, hidden), unit vectors.
        groups: (items,) int64; an image and a text with the same group belong together.
        parts: (items, parts, hidden), unit vectors of tiles (images) or sentences (texts), or None.
        part_mask: (items, parts), True = valid.
    """

    pooled: Tensor
    groups: Tensor
    parts: Tensor | None = None
    part_mask: Tensor | None = None

    def __post_init__(self):
        if self.pooled.ndim != 2 or self.groups.shape != self.pooled.shape[:1]:
            raise ValueError(
                f"expected embeddings (items, hidden) and one group per item, got {tuple(self.pooled.shape)} and "
                f"{tuple(self.groups.shape)}"
            )
        if not len(self.pooled):
            raise ValueError("expected at least one embedding to rank, got none")
        if not torch.isfinite(self.pooled).all():
            broken = (~torch.isfinite(self.pooled)).any(dim=1).nonzero().flatten().tolist()
            raise ValueError(
                f"{len(broken)} embeddings are not finite, among them number {broken[:3]}; check the model"
            )


def blocks(total: int, size: int) -> Iterator[slice]:
    """Slices of `size` that cover `total`."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def best_tile_scores(
    tiles: Tensor, tile_mask: Tensor, sentences: Tensor, sentence_mask: Tensor, temperature: float
) -> Tensor:
    """Mean over sentences of the soft maximum over tiles, for pairs: the leading axes are broadcast.

    Args:
        tiles: (..., tiles, hidden), sentences: (..., sentences, hidden), unit vectors; masks (..., tiles or sentences).
        temperature: of the soft maximum `temperature * logsumexp(cosine / temperature)`; 0 is the hard one.

    Returns:
        (...), 0 without a sentence or a tile.
    """
    cosines = torch.einsum("...sh,...th->...st", sentences, tiles)
    cosines = cosines.masked_fill(~tile_mask[..., None, :], -torch.inf)
    best = temperature * (cosines / temperature).logsumexp(dim=-1) if temperature else cosines.amax(dim=-1)
    counted = sentence_mask & tile_mask.any(dim=-1, keepdim=True)
    return best.masked_fill(~counted, 0).sum(dim=-1) / counted.sum(dim=-1).clamp(min=1)


def global_ranks(queries: GallerySide, gallery: GallerySide, block_size: int = 1024) -> Tensor:
    """The rank (queries,) of the first right answer of every query, from 1; ties count against it.

    Two passes over blocks of `block_size` x `block_size` cosines: the best right answer, then how many wrong ones are
    as good. Other right answers never count against the first.
    """
    check_answers(queries, gallery)
    ranks = []
    for rows in blocks(len(queries.pooled), block_size):
        first, groups = queries.pooled[rows].double(), queries.groups[rows, None]
        best = torch.full((len(first),), -torch.inf, dtype=torch.float64, device=first.device)
        for columns in blocks(len(gallery.pooled), block_size):
            cosines = first @ gallery.pooled[columns].double().T
            right = groups == gallery.groups[columns]
            best = torch.maximum(best, cosines.masked_fill(~right, -torch.inf).amax(dim=1))
        wrong = torch.zeros(len(first), dtype=torch.int64, device=first.device)
        for columns in blocks(len(gallery.pooled), block_size):
            cosines = first @ gallery.pooled[columns].double().T
            wrong += ((cosines >= best[:, None] - TIE) & (groups != gallery.groups[columns])).sum(dim=1)
        ranks.append(wrong + 1)
    return torch.cat(ranks)


def check_answers(queries: GallerySide, gallery: GallerySide) -> None:
    """Refuse queries without a right answer in the gallery: their rank would mean nothing."""
    lonely = (~torch.isin(queries.groups, gallery.groups)).nonzero().flatten().tolist()
    if lonely:
        raise ValueError(
            f"{len(lonely)} of {len(queries.groups)} queries have no right answer in the gallery, among them number "
            f"{lonely[:3]}; leave them out, or add what belongs to them"
        )


def shortlists(
    queries: GallerySide, gallery: GallerySide, rows: slice, length: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """The `length` nearest answers by cosine, (queries, length), and their cosines; right ones last among equals."""
    first, groups = queries.pooled[rows].double(), queries.groups[rows, None]
    scores = torch.empty(len(first), 0, dtype=torch.float64, device=first.device)
    indices = torch.empty(len(first), 0, dtype=torch.int64, device=first.device)
    for columns in blocks(len(gallery.pooled), block_size):
        cosines = first @ gallery.pooled[columns].double().T
        cosines = cosines - 2 * TIE * (groups == gallery.groups[columns])
        numbers = torch.arange(columns.start, columns.stop, device=first.device).expand_as(cosines)
        scores, indices = torch.cat([scores, cosines], dim=1), torch.cat([indices, numbers], dim=1)
        scores, kept = scores.topk(min(length, scores.shape[1]), dim=1)
        indices = indices.gather(1, kept)
    return indices, scores


@dataclass(frozen=True)
class CombinedRanking:
    """How the nearest by cosine are ordered anew: `alpha * cosine + (1 - alpha) * local`, as the retriever does.

    Args:
        alpha: weight of the cosine; 1 keeps its order.
        temperature: of the soft maximum over tiles.
        shortlist: how many of the nearest are ordered anew; the others stay behind them as they were.
    """

    alpha: float
    temperature: float
    shortlist: int = 100

    def __post_init__(self):
        if not 0 <= self.alpha <= 1 or self.temperature < 0 or self.shortlist < 1:
            raise ValueError(
                "expected alpha in 0..1, a temperature of 0 or more and a shortlist of 1 or more, got "
                f"{self.alpha}, {self.temperature}, {self.shortlist}"
            )

    def scores(self, cosines: Tensor, tiles: Tensor, tile_mask: Tensor, sentences: Tensor, sentence_mask: Tensor):
        """Scores of pairs in the shape of `cosines`; a text without sentences keeps its cosine."""
        local = best_tile_scores(tiles, tile_mask, sentences, sentence_mask, self.temperature)
        return torch.where(sentence_mask.any(dim=-1), self.alpha * cosines + (1 - self.alpha) * local, cosines)


def combined_ranks(
    queries: GallerySide,
    gallery: GallerySide,
    ranking: CombinedRanking,
    text_queries: bool,
    block_size: int = 1024,
) -> Tensor:
    """Ranks (queries,) after the shortlist of every query was ordered anew; ties count against the right answer.

    Args:
        text_queries: texts ask for images; False: images ask for texts.
    """
    if queries.parts is None or gallery.parts is None:
        raise ValueError("expected tiles of the images and sentences of the texts to rank by, got none")
    ranks = global_ranks(queries, gallery, block_size)
    for rows in blocks(len(queries.pooled), max(1, block_size // 64)):
        indices, cosines = shortlists(queries, gallery, rows, ranking.shortlist, block_size)
        asked = queries.parts[rows, None].double(), queries.part_mask[rows, None]
        found = gallery.parts[indices].double(), gallery.part_mask[indices]
        tiles, sentences = (found, asked) if text_queries else (asked, found)
        scores = ranking.scores(cosines, *tiles, *sentences)
        right = queries.groups[rows, None] == gallery.groups[indices]
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1)
        wrong = ((scores >= best[:, None] - 2 * TIE) & ~right).sum(dim=1)
        # a right answer behind the shortlist keeps its rank
        ranks[rows] = torch.where(right.any(dim=1), wrong + 1, ranks[rows])
    return ranks

"""Tiles of an image and sentences of a caption in one space, and how well they fit."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitweave.modeling.contrastive_losses import at_least_float32, late_interaction
from vitweave.modeling.text_encoder import masked_means


class TileAlignment(nn.Module):
    """Projections of tiles and sentences, and the score of an image for a caption.

    A tile is the projected mean of the patches in one cell of a T x T grid, a sentence the projected mean of its
    tokens, both unit vectors. The score is the mean over sentences of the soft maximum over tiles of their cosine.

    Args:
        levels: T of every level; the tiles of all levels stand in one row, level by level and row by row.
        map_channels: channels of the map each level is cut from; equal ones share a projection.
        temperature: of the soft maximum; 0 is the hard one.
    """

    def __init__(
        self,
        levels: Sequence[int],
        map_channels: Sequence[int],
        text_hidden_size: int,
        projection_dim: int,
        temperature: float,
    ):
        super().__init__()
        self.levels, self.map_channels, self.temperature = tuple(levels), tuple(map_channels), temperature
        self.tile_projections = nn.ModuleDict(
            {str(width): nn.Linear(width, projection_dim, bias=False) for width in sorted(set(map_channels))}
        )
        self.sentence_projection = nn.Linear(text_hidden_size, projection_dim, bias=False)

    def tiles(self, maps: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Unit vectors of the tiles.

        Args:
            maps: (batch, channels, height, width) of each level.
            masks: (batch, height, width) of each level, True = valid.

        Returns:
            tiles (batch, tiles, projection_dim), mask (batch, tiles): True where a tile holds a valid patch.
        """
        found, valid = [], []
        for level, feature_map, mask in zip(self.levels, maps, masks, strict=True):
            pooled, holds = pool_tiles(feature_map, mask, level)
            found.append(self.tile_projections[str(pooled.shape[-1])](pooled))
            valid.append(holds)
        return F.normalize(torch.cat(found, dim=1), dim=-1), torch.cat(valid, dim=1)

    def tile_boxes(self) -> Tensor:
        """(tiles, 4), the top, left, bottom and right edge of every tile as shares of the image's height and width."""
        boxes = [
            (row / level, column / level, (row + 1) / level, (column + 1) / level)
            for level in self.levels
            for row in range(level)
            for column in range(level)
        ]
        return torch.tensor(boxes)

    def sentences(self, tokens: Tensor, sentence_ids: Tensor, num_sentences: int) -> tuple[Tensor, Tensor]:
        """Unit vectors of the sentences.

        Args:
            tokens: (batch, tokens, hidden).
            sentence_ids: (batch, tokens), the sentence each token belongs to, -1 for none.
            num_sentences: of the longest caption.

        Returns:
            sentences (batch, sentences, projection_dim), mask (batch, sentences): True where a sentence has a token.
        """
        members = sentence_ids[:, None] == torch.arange(num_sentences, device=tokens.device)[:, None]
        means = self.sentence_projection(masked_means(tokens, members))
        return F.normalize(means, dim=-1), members.any(dim=-1)

    def scores(self, tiles: Tensor, tile_mask: Tensor, sentences: Tensor, sentence_mask: Tensor) -> Tensor:
        """(images, texts), in float32 at least; 0 for texts without sentences."""
        return late_interaction(
            at_least_float32(sentences),
            at_least_float32(tiles),
            sentence_mask,
            tile_mask,
            temperature=self.temperature,
            reduction="mean",
        ).T


def check_alignment(alignment: TileAlignment | None, sentence_ids: Tensor | bool | None = True) -> None:
    """Refuse to align without the parts for it, or without sentences."""
    if alignment is None:
        raise ValueError("this retriever aligns no tiles and sentences; build it with local_loss_weight above 0")
    if sentence_ids is None:
        raise ValueError(
            "tile <-> sentence alignment expected sentence_ids (texts, tokens): the number of the sentence each"
            " token belongs to, -1 for none; got none. FigureTextProcessor makes them; zeros take each caption as"
            " one sentence, and local_loss_weight=0 builds a model without alignment"
        )


def count_sentences(sentence_ids: Tensor) -> int:
    """Sentences of the longest caption; while compiling, where values are not known, no fewer than that."""
    return sentence_ids.shape[1] if torch.compiler.is_compiling() else int(sentence_ids.max()) + 1


def pool_tiles(feature_map: Tensor, mask: Tensor | None, level: int) -> tuple[Tensor, Tensor]:
    """Means over the cells of a `level` x `level` grid; a position that two cells share counts in each by its part.

    Args:
        feature_map: (batch, channels, height, width), of any size.
        mask: (batch, height, width), True = valid; the others count nowhere.

    Returns:
        tiles (batch, level * level, channels), mask (batch, level * level): True where a tile holds a valid position.
    """
    height, width = feature_map.shape[-2:]
    rows, columns = (cell_shares(size, level, feature_map) for size in (height, width))
    if mask is None:
        mask = torch.ones_like(feature_map[:, 0], dtype=torch.bool)
    weights = mask.to(feature_map.dtype)
    area = torch.einsum("th,bhw,sw->bts", rows, weights, columns).flatten(1)  # (batch, tiles)
    total = torch.einsum("th,bchw,sw->btsc", rows, feature_map.masked_fill(~mask[:, None], 0), columns).flatten(1, 2)
    holds = area > 0
    return total / torch.where(holds, area, 1)[..., None], holds


def cell_shares(size: int, cells: int, like: Tensor) -> Tensor:
    """(cells, size), how much of each position lies in each of `cells` equal parts of the axis."""
    positions = torch.arange(size, device=like.device)
    parts = torch.arange(cells, device=like.device)[:, None]
    # in units of 1 / cells of a position, so that the edges are exact integers
    end = torch.minimum((positions + 1) * cells, (parts + 1) * size)
    start = torch.maximum(positions * cells, parts * size)
    return (end - start).clamp(min=0).to(like.dtype) / cells


def resized_mask(patch_mask: Tensor | None, grid: tuple[int, int], size: tuple[int, int]) -> Tensor | None:
    """A patch mask (batch, height * width) on a map of another size, (batch, *size), each from the nearest patch."""
    if patch_mask is None:
        return None
    mask = patch_mask.bool().unflatten(1, grid)
    if tuple(size) == tuple(grid):
        return mask
    return F.interpolate(mask[:, None].float(), size=size, mode="nearest")[:, 0] > 0

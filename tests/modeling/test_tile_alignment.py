import pytest
import torch
from retrieval_models import retriever

from vitweave.modeling.tile_alignment import cell_shares, count_sentences, pool_tiles, resized_mask


def test_tiles_are_means_of_their_patches_also_on_oblong_grids():
    maps = torch.randn(2, 3, 4, 6)
    tiles, holds = pool_tiles(maps, None, 2)
    expected = torch.stack([maps[:, :, i : i + 2, j : j + 3].mean((2, 3)) for i in (0, 2) for j in (0, 3)], dim=1)
    torch.testing.assert_close(tiles, expected)
    assert holds.all()
    split, _ = pool_tiles(maps[:, :, :3, :1], None, 2)  # the middle of three rows lies in both halves
    expected = (maps[:, :, 0, 0] + maps[:, :, 1, 0] / 2) / 1.5
    torch.testing.assert_close(split[:, 0], expected)
    torch.testing.assert_close(pool_tiles(maps[:, :, :1, :1], None, 4)[0], maps[:, :, :1, 0].mT.repeat(1, 16, 1))


def test_padding_changes_no_tile():
    maps = torch.randn(1, 3, 4, 4)
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[:, 3], mask[:, :2, :2] = False, False
    tiles, holds = pool_tiles(maps, mask, 2)
    assert holds.tolist() == [[False, True, True, True]]
    torch.testing.assert_close(tiles[:, 3], maps[:, :, 2, 2:].mean(2))
    assert torch.equal(pool_tiles(maps.masked_fill(~mask[:, None], 9.0), mask, 2)[0], tiles)


@pytest.mark.parametrize(("size", "cells"), [(4, 2), (5, 3), (3, 7), (1, 4)])
def test_cells_are_equal_parts_of_an_axis(size, cells):
    shares = cell_shares(size, cells, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(shares.sum(0), torch.ones(size).double())
    torch.testing.assert_close(shares.sum(1), torch.full((cells,), size / cells).double())


def test_a_patch_mask_fits_finer_and_coarser_maps():
    mask = torch.tensor([[True, True, False, False]])
    assert resized_mask(mask, (2, 2), (4, 4))[0].tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    assert resized_mask(mask, (2, 2), (2, 2))[0].tolist() == [[True, True], [False, False]]
    assert resized_mask(None, (2, 2), (4, 4)) is None


def test_sentences_are_counted_to_the_longest_caption():
    assert count_sentences(torch.tensor([[-1, 0, 0], [0, 1, 2]])) == 3
    assert count_sentences(torch.full((2, 3), -1)) == 0


def colours_and_words(batch: int, generator: torch.Generator) -> tuple[dict, torch.Tensor]:
    """Images of four coloured quarters, each named by one of four sentences, and the quarter of every sentence."""
    palette = torch.rand(8, 3, generator=torch.Generator().manual_seed(0)) * 4 - 2
    chosen = torch.stack([torch.randperm(8, generator=generator)[:4] for _ in range(batch)])
    pixels = palette[chosen].view(batch, 2, 2, 3).permute(0, 3, 1, 2)
    pixels = pixels.repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
    quarter = torch.stack([torch.randperm(4, generator=generator) for _ in range(batch)])
    words = chosen.gather(1, quarter)
    ids = torch.stack([4 + words, 20 + words], dim=2).flatten(1)  # two words each
    sentence_ids = torch.arange(4).repeat_interleave(2).expand_as(ids)
    pixels = pixels + 0.1 * torch.randn(pixels.shape, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids, "sentence_ids": sentence_ids}, quarter


@pytest.mark.slow
def test_sentences_learn_to_point_at_their_tile_from_pairs_alone():
    generator = torch.Generator().manual_seed(0)
    model = retriever(tile_levels=[2]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(250):
        optimizer.zero_grad()
        model(**colours_and_words(32, generator)[0]).loss.backward()
        optimizer.step()
    inputs, quarter = colours_and_words(200, generator)
    with torch.no_grad():
        tiles, _ = model.eval().get_tile_features(inputs.pop("pixel_values"))
        sentences, _ = model.get_sentence_features(**inputs)
    pointed = torch.einsum("bsh,bth->bst", sentences, tiles).argmax(dim=-1)
    assert (pointed == quarter).float().mean() > 0.45  # chance is 0.25

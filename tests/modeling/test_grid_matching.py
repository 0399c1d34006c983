"""Resizes, unshufflings and position tables: against hand-computed values, their inverses and transformers."""

import pytest
import torch
import torch.nn.functional as F
from transformers import InternVLConfig, InternVLModel

from vitweave.modeling.grid_matching import (
    RESIZES,
    align_ac,
    avg_pool,
    bilinear,
    bilinear_ac,
    map_to_tokens,
    pixel_unshuffle_a,
    pixel_unshuffle_b,
    resample_positions,
)
from vitweave.modeling.tokens import tokens_to_map

ROW = torch.tensor([0.0, 1.0, 4.0, 9.0]).view(1, 1, 1, 4)


def test_resizes_give_the_values_of_their_definitions():
    def row(resize, width):
        return resize(ROW, (1, width)).flatten().tolist()

    assert row(bilinear_ac, 7) == pytest.approx([0, 0.5, 1, 2.5, 4, 6.5, 9])  # ends on ends
    assert row(bilinear, 8) == pytest.approx([0, 0.25, 0.75, 1.75, 3.25, 5.25, 7.75, 9])  # cell centres
    assert row(bilinear, 2) == pytest.approx([0.5, 6.5])
    assert row(avg_pool, 2) == pytest.approx([0.5, 6.5])
    assert row(bilinear_ac, 2) == pytest.approx([0, 9])  # no antialias
    assert row(align_ac, 7) == row(bilinear_ac, 7) and row(align_ac, 2) == row(avg_pool, 2)


@pytest.mark.parametrize("name", sorted(RESIZES))
def test_every_resize_takes_grids_that_are_not_square(name):
    fine, resize = torch.randn(2, 3, 4, 12), RESIZES[name]
    assert resize(fine, (4, 12)) is fine
    assert resize(fine, (2, 4)).shape == (2, 3, 2, 4)
    torch.testing.assert_close(resize(torch.ones(1, 1, 4, 12), (2, 3)), torch.ones(1, 1, 2, 3))


@pytest.mark.parametrize("name", sorted(RESIZES))
def test_resizes_compute_in_float32(name):
    low = torch.randn(1, 2, 6, 6, dtype=torch.bfloat16)
    resized = RESIZES[name](low, (3, 2))
    assert resized.dtype == torch.bfloat16
    assert torch.equal(resized, RESIZES[name](low.float(), (3, 2)).bfloat16())
    assert RESIZES[name](low.double(), (3, 2)).dtype == torch.float64


def test_blocks_that_are_not_whole_are_refused():
    with pytest.raises(ValueError, match="multiples of 3x4 to average over whole blocks, got 4x12"):
        avg_pool(torch.zeros(1, 1, 4, 12), (3, 4))
    with pytest.raises(ValueError, match="multiples of 3x12"):
        align_ac(torch.zeros(1, 1, 4, 12), (3, 12))
    for unshuffle in (pixel_unshuffle_a, pixel_unshuffle_b):
        with pytest.raises(ValueError, match="an unshuffling by 4 divides, got 8x6"):
            unshuffle(torch.zeros(1, 1, 8, 6), 4)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_unshufflings_follow_their_index_rules(factor):
    given = torch.arange(2 * 5 * 6 * 12).view(2, 5, 6, 12)
    a, b = (unshuffle(given, factor) for unshuffle in (pixel_unshuffle_a, pixel_unshuffle_b))
    assert a.shape == b.shape == (2, 5 * factor**2, 6 // factor, 12 // factor)
    for c in range(5):
        for dy in range(factor):
            for dx in range(factor):
                cells = given[:, c, dy::factor, dx::factor]
                assert torch.equal(a[:, (dy * factor + dx) * 5 + c], cells)
                assert torch.equal(b[:, (c * factor + dy) * factor + dx], cells)


@pytest.mark.parametrize("factor", [2, 3])
def test_unshufflings_can_be_undone(factor):
    given = torch.randn(2, 5, 6, 12)
    assert torch.equal(F.pixel_shuffle(pixel_unshuffle_b(given, factor), factor), given)
    to_b = pixel_unshuffle_a(given, factor).unflatten(1, (factor**2, 5)).transpose(1, 2).flatten(1, 2)
    assert torch.equal(F.pixel_shuffle(to_b, factor), given)


def test_order_a_is_that_of_internvl():
    config = InternVLConfig()
    model = InternVLModel.__new__(InternVLModel)
    model.__dict__["config"] = config
    given = torch.randn(2, 8, 6, 3)  # channels last; the two grid axes of the same kind of length
    expected = InternVLModel.pixel_shuffle(model, given, scale_factor=0.5)
    assert torch.equal(pixel_unshuffle_a(given.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1), expected)


def test_maps_and_tokens_are_read_row_by_row():
    tokens = torch.arange(6).view(1, 6, 1)
    assert tokens_to_map(tokens, (2, 3)).flatten(1).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert tokens_to_map(tokens, (2, 3))[0, 0, 1, 0] == 3
    assert torch.equal(map_to_tokens(tokens_to_map(tokens, (2, 3))), tokens)


@pytest.mark.parametrize("antialias", [True, False])
def test_position_tables_keep_their_class_rows(antialias):
    table = torch.randn(1, 2 + 4 * 6, 8)
    resampled = resample_positions(table, (2, 9), antialias, stored=(4, 6), num_prefixes=2)
    assert resampled.shape == (1, 2 + 18, 8) and torch.equal(resampled[:, :2], table[:, :2])
    without = resample_positions(table[:, 2:], (2, 9), antialias, stored=(4, 6))
    assert torch.equal(resampled[:, 2:], without)
    maps = F.interpolate(tokens_to_map(table[:, 2:], (4, 6)), size=(2, 9), mode="bicubic", antialias=antialias)
    torch.testing.assert_close(without, map_to_tokens(maps))


def test_position_tables_of_the_same_grid_come_back_as_they_are():
    table = torch.randn(1, 17, 8)
    assert resample_positions(table, (4, 4), num_prefixes=1) is table
    assert not torch.equal(resample_positions(table, (3, 3), num_prefixes=1)[:, 1:], table[:, 1:10])
    low = table.bfloat16()
    expected = resample_positions(low.float(), (6, 5), num_prefixes=1).bfloat16()
    assert torch.equal(resample_positions(low, (6, 5), num_prefixes=1), expected)


def test_position_tables_of_an_unknown_grid_are_refused():
    with pytest.raises(ValueError, match="a table of 4x4 positions, got 17 beside num_prefixes=0"):
        resample_positions(torch.zeros(1, 17, 8), (3, 3))
    with pytest.raises(ValueError, match="a table of 3x5 positions, got 16"):
        resample_positions(torch.zeros(1, 16, 8), (3, 3), stored=(3, 5))


def test_gradients_pass_and_one_graph_is_compiled():
    def all_of_them(feature_map):
        tokens = map_to_tokens(pixel_unshuffle_a(feature_map, 2)) + map_to_tokens(pixel_unshuffle_b(feature_map, 2))
        tables = resample_positions(tokens, (3, 3), stored=(2, 4))
        return tables.sum() + sum(resize(feature_map, (2, 4)).square().sum() for resize in RESIZES.values())

    given = torch.randn(2, 3, 4, 8, requires_grad=True)
    found = torch.compile(all_of_them, fullgraph=True, backend="eager")(given)
    torch.testing.assert_close(found, all_of_them(given))
    found.backward()
    assert given.grad.all()

"""Dynamic tiling: which grid an image gets, ties and degenerate limits included, and what its tiles show."""

import numpy as np
import PIL.Image
import pytest

from vitweave.processing.tiling import MAX_TILES, choose_grid, dynamic_tiles, tile_boxes, tile_count, tiling_options

LEO = {"tile_size": 448, "max_tiles": 6}


@pytest.mark.parametrize(
    ("size", "options", "grid"),
    [
        ((800, 1300), LEO, (2, 3)),
        ((1300, 800), LEO, (3, 2)),
        ((640, 480), LEO, (3, 2)),
        ((1920, 1080), LEO, (2, 1)),
        ((500, 500), LEO, (1, 1)),
        ((3000, 200), LEO, (6, 1)),
        ((1, 5000), LEO, (1, 6)),
        ((448, 448), {"tile_size": 448, "max_tiles": 12}, (1, 1)),
        ((635, 635), {"tile_size": 448, "max_tiles": 12}, (2, 2)),  # 635 * 635 is above 2 * 448 * 448 = 633.6 ** 2
        ((633, 633), {"tile_size": 448, "max_tiles": 12}, (1, 1)),
        ((2000, 2000), {"tile_size": 448, "max_tiles": 12}, (3, 3)),
        ((500, 200), {"tile_size": 448, "min_tiles": 4, "max_tiles": 4}, (4, 1)),  # the official order at a tie
        ((5000, 2000), {"tile_size": 448, "min_tiles": 4, "max_tiles": 4}, (2, 2)),
        ((640, 480), {"tile_size": 448, "max_tiles": 1}, (1, 1)),
        ((640, 480), {"tile_size": 448, "max_tiles": 0}, (1, 1)),  # more images than tiles
        ((640, 480), {"tile_size": 448, "min_tiles": 3, "max_tiles": 2}, (1, 1)),
    ],
)
def test_chosen_grids(size, options, grid):
    assert choose_grid(*size, **options) == grid


def test_no_grid_within_the_limits_is_nearer():
    generator = np.random.default_rng(0)
    for width, height in generator.integers(1, 3000, (200, 2)).tolist():
        columns, rows = choose_grid(width, height, 224, 2, 9)
        assert 2 <= columns * rows <= 9
        for i in range(1, 10):
            for j in range(1, 10):
                if 2 <= i * j <= 9:
                    assert abs(width / height - columns / rows) <= abs(width / height - i / j)


def test_boxes_go_row_by_row():
    assert tile_boxes(2, 2, 3) == [(0, 0, 3, 3), (3, 0, 6, 3), (0, 3, 3, 6), (3, 3, 6, 6)]


def test_tiles_show_their_part_and_the_thumbnail_comes_last():
    quarters = np.kron(np.array([[10, 60], [120, 200]]), np.ones((56, 56))).astype(np.uint8)
    picture = PIL.Image.fromarray(quarters)
    tiles = [np.asarray(tile) for tile in dynamic_tiles(picture, 28, min_tiles=4, max_tiles=4)]
    assert [tile.shape for tile in tiles] == [(28, 28, 3)] * 5
    assert [int(tile[12, 12, 0]) for tile in tiles[:4]] == [10, 60, 120, 200]
    whole = picture.convert("RGB").resize((28, 28), PIL.Image.Resampling.BICUBIC)
    assert np.array_equal(tiles[4], np.asarray(whole))
    assert len(dynamic_tiles(picture, 28, 4, 4, thumbnail=False)) == 4
    assert len(dynamic_tiles(picture, 28, 1, 1)) == tile_count(112, 112, 28, 1, 1) == 1


def test_images_of_one_sample_share_the_tiles():
    picture = PIL.Image.new("RGB", (600, 100))
    counts = [len(dynamic_tiles(picture, 28, max_tiles=6, images_in_sample=images)) for images in (1, 2, 3, 7)]
    assert counts == [7, 4, 3, 1]


def test_absurd_limits_are_refused():
    with pytest.raises(ValueError, match=f"at most {MAX_TILES}, got 5000; released models use 6 to 40"):
        choose_grid(640, 480, 448, 1, 5000)
    with pytest.raises(ValueError, match=f"at most {MAX_TILES}"):
        tiling_options({"max_tiles": MAX_TILES + 1})
    with pytest.raises(ValueError, match="min_tiles=4 and max_tiles=2"):
        tiling_options({"min_tiles": 4, "max_tiles": 2})
    with pytest.raises(ValueError, match=r"unknown tiling options \['max_num'\]; known"):
        tiling_options({"max_num": 6})
    with pytest.raises(ValueError, match=r"at least one pixel.*got 0x480"):
        choose_grid(0, 480, 448)
    assert choose_grid(1, 10**6, 448, 1, MAX_TILES) == (1, MAX_TILES)

"""How many tokens an image becomes: one arithmetic for processor and model."""

from types import SimpleNamespace

import pytest

from vitweave.configuration.image_tokens import count_image_tokens, tokens_per_image, visible_grid
from vitweave.configuration.multi_encoder_presets import multi_encoder_preset

CAMBRIAN = {"tokens_per_tile": 576, "grid": (24, 24), "image_newline": True, "unpad": True}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tokens_per_tile": 512, "num_tiles": 7}, 3584),  # LEO, 6 tiles and the thumbnail
        ({"tokens_per_tile": 1024}, 1024),  # EAGLE
        ({"tokens_per_tile": 256, "num_tiles": 13}, 3328),  # InternVL, 12 tiles and the thumbnail
        (CAMBRIAN | {"image_size": (480, 640)}, 18 * 25),
        (CAMBRIAN | {"image_size": (640, 480)}, 24 * 19),
        (CAMBRIAN | {"image_size": (500, 500)}, 24 * 25),
        (CAMBRIAN | {"image_size": (1, 1000)}, 2 * 25),
        (CAMBRIAN | {"image_newline": False, "image_size": (480, 640)}, 18 * 24),
        ({"tokens_per_tile": 6, "grid": (2, 3), "image_newline": True, "num_tiles": 2}, 16),
    ],
)
def test_tokens_of_an_image(options, expected):
    assert tokens_per_image(**options) == expected


def test_what_remains_is_in_the_middle():
    for side in (4, 5, 24):
        for height, width in ((640, 480), (300, 900), (7, 5), (1, 999), (999, 1)):
            rows, columns, top, left = visible_grid(side, height, width)
            assert (2 * top + rows, 2 * left + columns) == (side, side) and min(rows, columns) >= 1
            assert visible_grid(side, width, height) == (columns, rows, left, top)


def test_a_config_counts_as_its_numbers_do():
    tower = SimpleNamespace(num_tokens=16, fused_grid=(4, 4))
    assert count_image_tokens(tower, 3) == 48
    vlm = SimpleNamespace(vision_config=tower, image_newline=True, unpad=True)
    assert count_image_tokens(vlm, 1, (900, 300)) == tokens_per_image(16, 1, (4, 4), True, True, (900, 300)) == 4 * 3


@pytest.mark.parametrize(
    ("name", "num_tiles", "expected"),
    [
        ("leo", 7, 3584),
        ("eagle-x5", 1, 1024),
        ("llava-hr", 1, 1024),
        ("mgm", 1, 576),
        ("mgm-hd", 1, 2880),
        ("cambrian", 1, 576),
        ("internvl", 13, 3328),
    ],
)
def test_published_towers(name, num_tiles, expected):
    assert count_image_tokens(multi_encoder_preset(name), num_tiles) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_per_tile": 16, "num_tiles": 0}, "at least one tile"),
        ({"tokens_per_tile": 0}, "at least one token"),
        ({"tokens_per_tile": 16, "grid": (4, 5)}, "4x5=20 tokens per tile on this grid, got 16"),
        ({"tokens_per_tile": 16, "image_newline": True}, "tokens are a sequence"),
        ({"tokens_per_tile": 20, "grid": (4, 5), "unpad": True, "image_size": (3, 3)}, "square grid, got 4x5"),
        (CAMBRIAN | {"image_size": (3, 3), "num_tiles": 2}, "one square-padded tile per image.*got 2 tiles"),
        (CAMBRIAN, "image_size=None"),
        (CAMBRIAN | {"image_size": (0, 3)}, "positive size"),
    ],
)
def test_counts_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tokens_per_image(**options)

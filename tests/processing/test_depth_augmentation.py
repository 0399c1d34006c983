"""Depth augmentation: image and depth move together, and the draw depends on (seed, epoch, index) only."""

import numpy as np
import PIL.Image
import pytest

from vitweave.processing.depth_augmentation import DepthAugmentation

rng = np.random.default_rng(0)
STEPS = np.kron(rng.integers(1, 6, (4, 6)), np.ones((10, 10))).astype(np.float32)  # (40, 60) flat patches, 1 to 5 m
STEPS[:4] = 0
IMAGE = PIL.Image.fromarray(np.repeat((STEPS * 40).astype(np.uint8)[..., None], 3, axis=2))  # brightness tells depth
EVERYTHING = {"crop_size": 32, "scale": (0.8, 1.3), "rotate": 5.0, "color_jitter": 0.3}


def draw(augmentation, epoch, index):
    image, depth = augmentation(IMAGE, STEPS, epoch, index)
    return np.asarray(image).tobytes() + depth.tobytes()


def test_the_draw_depends_on_seed_epoch_and_index_only():
    augmentation = DepthAugmentation(**EVERYTHING)
    first = {(epoch, index): draw(augmentation, epoch, index) for epoch in range(3) for index in range(4)}
    assert len(set(first.values())) == 12
    np.random.seed(5)
    assert {key: draw(DepthAugmentation(**EVERYTHING), *key) for key in reversed(first)} == first
    assert draw(DepthAugmentation(**EVERYTHING, seed=1), 0, 0) != first[0, 0]


@pytest.mark.parametrize(
    "options", [{}, {"crop_size": (12, 80)}, {"scale": (1.5, 2.5)}, {"rotate": 5.0}, EVERYTHING | {"color_jitter": 0}]
)
def test_depth_and_image_stay_aligned_and_depth_never_blends(options):
    for index in range(10):
        image, depth = DepthAugmentation(**options)(IMAGE, STEPS, 0, index)
        assert image.size == depth.shape[::-1] and depth.dtype == np.float32
        assert set(np.unique(depth)) <= {0, 1, 2, 3, 4, 5}
        assert depth.shape == (options["crop_size"] if options.get("crop_size") == (12, 80) else depth.shape)
        brightness = np.asarray(image)[..., 0].astype(int)
        agree = np.abs(brightness - depth * 40) <= 2
        assert agree[depth > 0].mean() > (0.6 if options else 0.999)  # but for pixels blended at the edges


def test_pixels_from_outside_hold_no_measurement():
    full = np.full((40, 60), 2.0, dtype=np.float32)
    _, padded = DepthAugmentation(crop_size=64)(IMAGE, full, 0, 0)
    assert (padded == 2).sum() == 40 * 60 and (padded == 0).sum() == 64 * 64 - 40 * 60
    _, turned = DepthAugmentation(rotate=20.0)(IMAGE, full, 0, 1)
    assert set(np.unique(turned)) == {0.0, 2.0}


def test_a_zoom_brings_the_scene_closer_only_if_asked():
    zoomed = DepthAugmentation(scale=(2.0, 2.0), zoom_depth=True)(IMAGE, STEPS, 0, 0)[1]
    plain = DepthAugmentation(scale=(2.0, 2.0))(IMAGE, STEPS, 0, 0)[1]
    np.testing.assert_array_equal(zoomed, plain / 2)
    assert plain.max() == STEPS.max() and plain.shape == (80, 120)


def test_one_option_does_not_move_the_others():
    for option in ({"color_jitter": 0.5}, {"zoom_depth": True}):
        plain, more = (DepthAugmentation(crop_size=24, **extra) for extra in ({}, option))
        for index in range(4):
            np.testing.assert_array_equal(plain(IMAGE, STEPS, 0, index)[1], more(IMAGE, STEPS, 0, index)[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scale": (0, 1)}, "scale"), ({"color_jitter": 1.0}, "color_jitter"), ({"rotate": 90}, "0 to 45 degrees")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DepthAugmentation(**options)


def test_bad_pairs_are_refused():
    with pytest.raises(ValueError, match="image 40x60 and depth map 10x60"):
        DepthAugmentation()(IMAGE, STEPS[:10], 0, 0)
    with pytest.raises(ValueError, match="ndarray"):
        DepthAugmentation()(np.asarray(IMAGE), STEPS, 0, 0)

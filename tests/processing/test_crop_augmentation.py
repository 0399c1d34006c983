"""Random resized crop and flip as a pure function of seed, epoch and index."""

import numpy as np
import PIL.Image
import pytest

from vitweave.processing.crop_augmentation import ClassificationAugmentation

RAMP = PIL.Image.fromarray(np.stack([*np.mgrid[:40, :60] * 4, np.zeros((40, 60))], axis=-1).astype(np.uint8))


def test_the_draw_depends_on_seed_epoch_and_index_alone():
    augment = ClassificationAugmentation((16, 24), color_jitter=0.3, seed=3)
    first = augment(RAMP, 2, 5)
    assert (first.width, first.height) == (24, 16)
    augment(RAMP, 0, 0)
    again = ClassificationAugmentation((16, 24), color_jitter=0.3, seed=3)
    assert np.array_equal(again(RAMP, 2, 5), first)
    others = [augment(RAMP, 3, 5), augment(RAMP, 2, 6), ClassificationAugmentation((16, 24), seed=4)(RAMP, 2, 5)]
    assert not any(np.array_equal(other, first) for other in others)


def test_windows_have_the_area_and_the_shape_asked_for():
    augment = ClassificationAugmentation(16, scale=(0.2, 0.4), ratio=(0.5, 2.0))
    for index in range(200):
        left, top, right, bottom = augment._window(60, 40, np.random.default_rng(index))
        assert 0 <= left < right <= 60 and 0 <= top < bottom <= 40
        wide, tall = right - left, bottom - top
        assert 0.18 < wide * tall / 2400 < 0.42 and 0.45 < wide / tall < 2.2
    narrow = ClassificationAugmentation(16, scale=(1.0, 1.0))
    assert narrow._window(100, 10, np.random.default_rng(0)) == (43, 0, 56, 10)  # nothing fits: the centre


def test_half_of_the_pictures_are_mirrored():
    whole = {"scale": (1.0, 1.0), "ratio": (1.5, 1.5)}
    mirrored = [
        np.asarray(ClassificationAugmentation((40, 60), **whole)(RAMP, 0, index))[0, 0, 1] > 100 for index in range(200)
    ]
    assert 80 < sum(mirrored) < 120
    never = ClassificationAugmentation((40, 60), **whole, flip=0.0)
    assert np.array_equal(never(RAMP, 0, 1), RAMP)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scale": (0.5, 2.0)}, "shares of the area"), ({"ratio": (2, 1)}, "ratio"), ({"color_jitter": 1}, "color_jit")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ClassificationAugmentation(16, **options)


def test_arrays_are_refused():
    with pytest.raises(ValueError, match="ndarray; use PIL"):
        ClassificationAugmentation(16)(np.zeros((8, 8, 3)), 0, 0)

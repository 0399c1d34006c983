"""Class weights from the pixels of the training maps."""

import numpy as np
import pytest

from vitweave.training.segmentation_data import balanced_class_weights

MAPS = [np.array([[0, 0, 0], [0, 1, 255]]), np.array([[0, 0, 0], [1, 0, 0]])]  # 9 pixels of 0, 2 of 1, none of 2


def test_power_0_weighs_all_pixels_alike():
    assert balanced_class_weights(MAPS, 3, power=0) == [1, 1, 1]


def test_power_1_lets_every_class_weigh_the_same_in_all():
    zero, one, two = balanced_class_weights(MAPS, 3, power=1)
    assert zero * 9 == pytest.approx(one * 2)
    assert two == one


def test_the_average_pixel_weighs_1():
    weights = np.array(balanced_class_weights(MAPS, 3))
    assert (weights * [9, 2, 0]).sum() == pytest.approx(11)


@pytest.mark.parametrize(("maps", "told"), [([np.array([[7]])], "below 3"), ([np.array([[255]])], "got none")])
def test_wrong_maps_are_refused(maps, told):
    with pytest.raises(ValueError, match=told):
        balanced_class_weights(maps, 3)

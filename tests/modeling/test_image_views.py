"""Views of an image: sizes, order, and where the global one comes from."""

import pytest
import torch
import torch.nn.functional as F

from vitweave.modeling.image_views import views_of

PIXELS = torch.randn(2, 3, 20, 32, generator=torch.Generator().manual_seed(0))


def resized(pixels, size):
    return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("global_view", [False, True])
@pytest.mark.parametrize("crops", [1, 2, 3])
def test_crops_lie_row_by_row_behind_the_global_view(crops, global_view):
    views = views_of(PIXELS, (5, 7), crops, global_view)
    assert views.shape == (2, crops**2 + global_view, 3, 5, 7)
    whole = resized(PIXELS, (5 * crops, 7 * crops))
    if global_view:
        torch.testing.assert_close(views[:, 0], resized(whole, (5, 7)))
        views = views[:, 1:]
    for index in range(crops**2):
        row, column = divmod(index, crops)
        part = whole[:, :, row * 5 : (row + 1) * 5, column * 7 : (column + 1) * 7]
        assert torch.equal(views[:, index], part)


def test_one_view_of_the_same_size_is_the_image():
    assert torch.equal(views_of(PIXELS, (20, 32))[:, 0], PIXELS)
    assert views_of(PIXELS, 6).shape == (2, 1, 3, 6, 6)

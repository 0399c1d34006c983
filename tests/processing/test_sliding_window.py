"""Sliding windows: full cover, equality with direct prediction where there is one window, averages."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from vitweave.processing.sliding_window import sliding_window_logits, window_starts


def pixels(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_windows_reach_both_borders_without_gaps():
    for length in range(5, 40):
        for window, stride in [(5, 5), (5, 3), (5, 1)]:
            starts = window_starts(length, window, stride)
            assert starts[0] == 0 and starts[-1] + window == length and starts == sorted(set(starts))
            assert all(later - earlier <= stride for earlier, later in pairwise(starts))


@pytest.mark.parametrize(("window", "stride"), [(8, 5), ((8, 6), (3, 6)), (64, 64)])
def test_a_pointwise_model_gives_the_direct_prediction(window, stride):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 1)
    images = pixels(2, 3, 17, 23)
    out = sliding_window_logits(model, images, window, stride, batch_size=3)
    torch.testing.assert_close(out, model(images), atol=1e-5, rtol=1e-5)


def test_one_window_as_large_as_the_image_is_the_direct_prediction():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3, padding=1)  # sees its neighbours, so window borders would show
    images = pixels(2, 3, 16, 20)
    assert torch.equal(sliding_window_logits(model, images, (16, 20), 8), model(images))


def test_a_small_image_is_padded_and_cut_again():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3, padding=1)
    images = pixels(1, 3, 6, 9)
    out = sliding_window_logits(model, images, 12, 8)
    torch.testing.assert_close(out, model(images))  # zero padding is what the convolution pads with


def test_overlaps_are_averaged():
    """A model that answers with the number of its call: the overlap is the mean of both calls."""
    calls = iter(range(10))
    out = sliding_window_logits(
        lambda crops: torch.full((len(crops), 1, 4, 4), float(next(calls))), pixels(1, 3, 4, 6), 4, 2, batch_size=1
    )
    assert out[0, 0, 0].tolist() == [0, 0, 0.5, 0.5, 1, 1]


def test_coarse_logits_are_resized_and_probabilities_sum_to_one():
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 4, stride=4)
    images = pixels(1, 3, 21, 30)
    out = sliding_window_logits(model, images, 12, 7, average="probabilities")
    assert out.shape == (1, 4, 21, 30)
    torch.testing.assert_close(out.sum(1), torch.ones(1, 21, 30))


@pytest.mark.parametrize(("options", "message"), [({"stride": 9}, "stride"), ({"average": "votes"}, "votes")])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sliding_window_logits(nn.Identity(), pixels(1, 3, 8, 8), **{"window": 8, "stride": 8} | options)

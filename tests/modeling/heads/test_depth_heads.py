"""The depth heads against their formulas, and their ranges."""

import pytest
import torch
import torch.nn.functional as F

from vitweave.modeling.heads.depth_bins import DepthBinsHead
from vitweave.modeling.heads.registry import DEPTH_HEADS, build_depth_head

CHANNELS = [8, 8]


def random_maps(seed=0):
    """Two maps of two pictures, and their class tokens."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(2, 8, 4, 6, generator=generator) for _ in CHANNELS]
    return maps, [torch.randn(2, 8, generator=generator) for _ in CHANNELS]


def randomise(head, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return head.eval()


def as_published(head: DepthBinsHead, maps, tokens):
    """DINOv2's order of steps: features upsampled first, then 256 scores, shares and their mean."""
    parts = [part for m, t in zip(maps, tokens, strict=True) for part in (m, t[:, :, None, None].expand_as(m))]
    features = F.interpolate(torch.cat(parts, dim=1), scale_factor=head.upsample, mode="bilinear")
    weights = head.classifier(features).relu() + 0.1
    shares = weights / weights.sum(dim=1, keepdim=True)
    return torch.einsum("bnhw,n->bhw", shares, head.bin_values(shares))[:, None]


@pytest.mark.parametrize("spacing", ["linear", "log"])
def test_upsampling_the_scores_gives_the_published_numbers(spacing):
    head = randomise(DepthBinsHead(CHANNELS, bins=32, spacing=spacing).double())
    maps, tokens = ([part.double() for part in parts] for parts in random_maps())
    torch.testing.assert_close(head(maps, tokens), as_published(head, maps, tokens), rtol=1e-12, atol=1e-12)


def test_bins_lie_in_range_and_evenly():
    like = torch.zeros(1, dtype=torch.float64)
    linear = DepthBinsHead([4], min_depth=1, max_depth=16, bins=4).bin_values(like)
    torch.testing.assert_close(linear, torch.tensor([1.0, 6, 11, 16], dtype=torch.float64))
    log = DepthBinsHead([4], min_depth=1, max_depth=8, bins=4, spacing="log").bin_values(like)
    torch.testing.assert_close(log, torch.tensor([1.0, 2, 4, 8], dtype=torch.float64))
    disparity = DepthBinsHead([4], "disparity", 1, 8, bins=3).bin_values(like)
    torch.testing.assert_close(disparity, torch.tensor([0, 0.5, 1], dtype=torch.float64))


def test_the_form_of_dinov3():
    head = DepthBinsHead(CHANNELS, use_batch_norm=True, use_cls_token=False, upsample=1)
    maps, _ = random_maps()
    assert head.classifier.in_channels == 16 and not head.reads_class_tokens
    assert head(maps).shape == (2, 1, 4, 6)
    features = torch.cat(maps, dim=1)
    mean, std = features.mean(dim=(0, 2, 3), keepdim=True), features.var(dim=(0, 2, 3), correction=0, keepdim=True)
    weights = head.classifier((features - mean) / (std + 1e-5).sqrt()).relu() + 0.1
    expected = torch.einsum("bnhw,n->bhw", weights, head.bin_values(weights)) / weights.sum(dim=1)
    torch.testing.assert_close(head.train()(maps)[:, 0], expected)


@pytest.mark.parametrize("name", sorted(DEPTH_HEADS))
def test_metres_stay_in_range_whatever_the_features(name):
    head = randomise(build_depth_head(name, CHANNELS, "metres", 0.5, 20.0))
    maps, tokens = random_maps()
    for size in (0.0, 1.0, 1e3):
        depth = head([size * m for m in maps], [size * t for t in tokens])
        assert depth.min() >= 0.5 - 1e-4 and depth.max() <= 20 + 1e-3


@pytest.mark.parametrize("name", sorted(DEPTH_HEADS))
def test_disparity_is_not_negative(name):
    head = randomise(build_depth_head(name, CHANNELS, "disparity", 0.5, 20.0))
    maps, tokens = random_maps()
    assert head([10 * m for m in maps], tokens).min() >= 0


@pytest.mark.parametrize("depth_target", ["metres", "disparity"])
@pytest.mark.parametrize("name", sorted(DEPTH_HEADS))
def test_every_weight_gets_a_gradient_from_the_start(name, depth_target):
    torch.manual_seed(0)
    head = build_depth_head(name, CHANNELS, depth_target, 0.001, 10.0)
    depth = head(*random_maps())
    (depth * torch.randn(depth.shape)).sum().backward()
    idle = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]
    assert not idle


def test_maps_of_several_sizes():
    maps = [torch.randn(1, 4, 9, 7), torch.randn(1, 8, 5, 4)]
    sizes = {"linear": (36, 28), "regression": (9, 7), "dpt": (36, 28)}
    for name, size in sizes.items():
        options = {"linear": {"use_cls_token": False}, "dpt": {"readout": "ignore"}}.get(name)
        head = build_depth_head(name, [4, 8], "metres", 0.001, 10.0, options).eval()
        assert head(maps).shape == (1, 1, *size)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lineer", {}, "unknown head_type of a depth model 'lineer' .did you mean 'linear'"),
        ("mlp", {}, "known: .'dpt', 'linear', 'regression'"),
        ("linear", {"bin": 3}, "the head 'linear' has no option 'bin' .did you mean 'bins'"),
        ("linear", {"max_depth": 80}, "no option 'max_depth'"),
        ("linear", {"spacing": "sid"}, "expected spacing 'linear' or 'log', got 'sid'"),
        ("linear", {"bins": 1}, "bins >= 2 and upsample >= 1, got 1 and 4"),
        ("dpt", {"readout": "cat"}, "unknown readout 'cat'"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_depth_head(name, CHANNELS, "metres", 0.001, 10.0, options)


@pytest.mark.parametrize(
    ("value_range", "message"),
    [
        (("meters", 0.001, 10.0), "unknown depth_target 'meters'; known: .'disparity', 'metres'"),
        (("metres", 0.0, 10.0), "0 < min_depth < max_depth in metres, got 0.0 and 10.0"),
        (("metres", 10.0, 1.0), "got 10.0 and 1.0"),
    ],
)
@pytest.mark.parametrize("name", sorted(DEPTH_HEADS))
def test_ranges_that_do_not_fit_are_refused(name, value_range, message):
    with pytest.raises(ValueError, match=message):
        build_depth_head(name, CHANNELS, *value_range)
    with pytest.raises(ValueError, match="disparity begins at 0"):
        build_depth_head("linear", CHANNELS, "disparity", 0.001, 10.0, {"spacing": "log"})

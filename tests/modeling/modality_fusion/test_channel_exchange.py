"""Channel exchange: thresholds, the mean over present sensors, penalties on parts of the channels."""

import pytest
import torch
from modality_fusion_checks import (
    check_absent_sensors,
    check_bfloat16,
    check_compiles,
    check_exports,
    check_images_do_not_see_each_other,
    random_streams,
)

from vitweave.modeling.modality_fusion.base import BlockInputs
from vitweave.modeling.modality_fusion.channel_exchange import (
    ChannelExchangeFusion,
    exchange_channels,
    sparsity_penalty,
)
from vitweave.modeling.modality_fusion.registry import build_modality_fusion

HIDDEN = 32
every_count = pytest.mark.parametrize("modalities", [2, 3, 4])


@every_count
def test_the_exchange_is_the_formula_channel_by_channel(modalities):
    streams, inputs = random_streams(modalities, prefix=1)
    inputs.scales[0, 2], inputs.scales[1, 3] = -0.9, 0.01  # one that stays in modality 0 only, one that goes in 1 only
    fusion = ChannelExchangeFusion(modalities, HIDDEN)
    fused, _ = fusion(streams, inputs)
    for m, channel in torch.cartesian_prod(torch.arange(modalities), torch.arange(HIDDEN)).tolist():
        others = [streams[o, :, :, channel] for o in range(modalities) if o != m]
        kept = inputs.scales[m, channel].abs() >= 0.02
        expected = streams[m, :, :, channel] if kept else sum(others) / len(others)
        torch.testing.assert_close(fused[m, :, :, channel], expected)
    torch.testing.assert_close(fusion.last_exchange_ratio, (inputs.scales.abs() < 0.02).float().mean(dim=1))
    assert fusion.last_exchange_ratio.min() > 0.3 and fusion.last_exchange_ratio.max() < 0.7


@pytest.mark.parametrize("sign", [1, -1])
def test_a_scale_equal_to_the_threshold_keeps_its_channel(sign):
    at = torch.tensor(0.02)
    scales = sign * torch.stack([at, torch.nextafter(at, torch.tensor(0.0)), at.double().float(), torch.tensor(1.0)])
    streams = random_streams(hidden=4)[0]
    exchanged = exchange_channels(streams, torch.stack([scales, torch.ones(4)]), 0.02)
    assert torch.equal(exchanged[0][..., [0, 2, 3]], streams[0][..., [0, 2, 3]])
    assert torch.equal(exchanged[0][..., 1], streams[1][..., 1]) and torch.equal(exchanged[1], streams[1])


def test_channels_cross_in_both_directions_at_once():
    streams = random_streams()[0]
    exchanged = exchange_channels(streams, torch.zeros(2, HIDDEN), 0.02)
    assert torch.equal(exchanged, streams.flip(0))


@every_count
def test_a_new_norm_changes_nothing(modalities):
    streams, inputs = random_streams(modalities)
    inputs.scales = torch.ones(modalities, HIDDEN)
    fusion = ChannelExchangeFusion(modalities, HIDDEN)
    assert torch.equal(fusion(streams, inputs)[0], streams) and not fusion.last_exchange_ratio.any()
    assert not list(fusion.parameters())


@pytest.mark.parametrize(
    ("modalities", "channels", "parts"),
    [(2, 6, [3, 3]), (2, 5, [2, 3]), (3, 9, [3, 3, 3]), (3, 8, [2, 3, 3]), (4, 9, [2, 2, 2, 3])],
)
def test_the_penalty_is_the_sum_over_the_modality_s_own_part(modalities, channels, parts):
    scales = torch.randn(modalities, channels, requires_grad=True)
    penalty = sparsity_penalty(scales)
    penalty.backward()
    start = 0
    expected = torch.zeros(modalities, channels)
    for m, width in enumerate(parts):
        expected[m, start : start + width] = scales[m, start : start + width].detach().sign()
        start += width
    assert start == channels and torch.equal(scales.grad, expected)
    torch.testing.assert_close(penalty, (scales * expected).sum())
    streams = random_streams(modalities, hidden=channels)[0]
    inputs = BlockInputs(streams, (4, 6), scales=scales)
    torch.testing.assert_close(ChannelExchangeFusion(modalities, channels)(streams, inputs)[1], penalty)


def test_gradients_go_to_the_stream_whose_channel_is_used():
    streams, inputs = random_streams()
    scales = torch.ones(2, HIDDEN)
    scales[0, :8] = 0
    inputs.scales = scales
    ChannelExchangeFusion(2, HIDDEN)(streams.requires_grad_(), inputs)[0].sum().backward()
    assert not streams.grad[0, ..., :8].any() and torch.equal(streams.grad[1, ..., :8].unique(), torch.tensor([2.0]))
    assert torch.equal(streams.grad[..., 8:].unique(), torch.tensor([1.0]))


@every_count
def test_absent_sensors_lend_nothing(modalities):
    check_absent_sensors(ChannelExchangeFusion(modalities, HIDDEN))


def test_the_mean_is_over_the_sensors_that_are_present():
    streams, inputs = random_streams(4)
    inputs.present = torch.tensor([[True] * 3, [False, True, True], [True, False, True], [True, True, False]])
    inputs.scales = torch.zeros(4, HIDDEN)
    fused, _ = ChannelExchangeFusion(4, HIDDEN)(streams, inputs)
    torch.testing.assert_close(fused[0, 0], (streams[2, 0] + streams[3, 0]) / 2)
    torch.testing.assert_close(fused[1, 2], (streams[0, 2] + streams[2, 2]) / 2)


@every_count
def test_images_do_not_see_each_other_and_bfloat16_comes_close(modalities):
    check_images_do_not_see_each_other(ChannelExchangeFusion(modalities, HIDDEN))
    check_bfloat16(ChannelExchangeFusion(modalities, HIDDEN))


@pytest.mark.parametrize("modalities", [2, 3])
def test_compiles_to_one_graph(modalities):
    check_compiles(ChannelExchangeFusion(modalities, HIDDEN))


@pytest.mark.slow
@pytest.mark.parametrize("modalities", [2, 3])
def test_exports_with_any_batch_size(modalities):
    check_exports(ChannelExchangeFusion(modalities, HIDDEN))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="has no option 'treshold'"):
        build_modality_fusion("channel_exchange", 2, HIDDEN, {"treshold": 0.1})
    with pytest.raises(ValueError, match="at least two modalities"):
        ChannelExchangeFusion(1, HIDDEN)

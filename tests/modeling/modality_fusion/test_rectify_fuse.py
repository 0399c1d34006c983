"""CMX's rectify and fuse pair: pairs of two, three and four sensors, absent ones, starts."""

from dataclasses import replace

import pytest
import torch
from modality_fusion_checks import (
    check_absent_sensors,
    check_bfloat16,
    check_compiles,
    check_exports,
    check_images_do_not_see_each_other,
    every_presence,
    hosted,
    moved,
    random_streams,
)
from model_checks import check_saved_and_loaded_equal

from vitweave.modeling.modality_fusion.rectify_fuse import RectifyFuseFusion
from vitweave.modeling.modality_fusion.registry import build_modality_fusion

HIDDEN = 32
every_count = pytest.mark.parametrize("modalities", [2, 3, 4])


def trained(modalities: int, **options) -> RectifyFuseFusion:
    torch.manual_seed(0)
    fusion = RectifyFuseFusion(modalities, HIDDEN, **{"head_width": 8, "start_gate": 0.5} | options)
    return moved(fusion, by=0.1).eval()


def of_two(fusion: RectifyFuseFusion, modalities: int) -> RectifyFuseFusion:
    """The same weights for two streams."""
    pair = trained(2, fuse="none" if fusion.fuse == "none" else "map")
    pair.load_state_dict({n: t for n, t in fusion.state_dict().items() if n != "fused_scale"})
    return pair


@pytest.mark.parametrize("fuse", ["none", "map"])
def test_two_modalities_take_from_each_other(fuse):
    streams, inputs = random_streams()
    fusion = trained(2, fuse=fuse, lambda_c=0.3, lambda_s=0.8)
    rectified, penalty = fusion(streams, inputs)
    gates = fusion.gates(streams[:, None])[:, 0]  # how much of each stream the other one takes
    torch.testing.assert_close(rectified[0], streams[0] + gates[1] * streams[1])
    torch.testing.assert_close(rectified[1], streams[1] + gates[0] * streams[0])
    assert penalty is None and gates.min() > 0 and gates.max() < 1.1
    assert gates.std(dim=(1, 2, 3)).min() > 0.01


def test_the_gates_are_a_part_per_channel_and_a_part_per_place():
    streams, _ = random_streams()
    channel = trained(2, lambda_s=0.0).gates(streams[:, None])
    place = trained(2, lambda_c=0.0).gates(streams[:, None])
    assert channel.expand(2, 1, 3, 24, HIDDEN).std(dim=3).max() == 0 and channel.std(dim=4).min() > 0
    assert place.expand(2, 1, 3, 24, HIDDEN).std(dim=4).max() == 0 and place.std(dim=3).min() > 0
    torch.testing.assert_close(trained(2).gates(streams[:, None]), channel + place)


@pytest.mark.parametrize("modalities", [3, 4])
def test_more_modalities_are_the_mean_over_pairs(modalities):
    streams, inputs = random_streams(modalities)
    fusion = trained(modalities)
    pair = of_two(fusion, modalities)
    rectified, taken = fusion.rectify(streams), torch.zeros_like(streams)
    for low in range(modalities):
        for high in range(low + 1, modalities):
            both = streams[[low, high]]
            taken[[low, high]] += pair.rectify(both) - both
    torch.testing.assert_close(rectified, streams + taken / (modalities - 1), rtol=1e-4, atol=1e-5)
    maps = [
        pair.fused(rectified[[low, high]], inputs.grid)
        for low in range(modalities)
        for high in range(low + 1, modalities)
    ]
    fused = fusion.fused(rectified, inputs.grid)
    torch.testing.assert_close(fused, sum(maps) / len(maps), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        fusion(streams, inputs)[0], rectified + fusion.fused_scale[:, None, None] * fused, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("modalities", [3, 4])
def test_an_absent_sensor_leaves_the_fusion_of_the_others(modalities):
    streams, inputs = random_streams(modalities)
    fusion = trained(modalities)
    inputs.present = torch.ones(modalities, 3, dtype=torch.bool)
    inputs.present[2:] = False
    fused = fusion(streams, inputs)[0][:2]
    pair = of_two(fusion, modalities)
    rectified = pair(streams[:2], replace(inputs, present=None))[0]
    added = pair.fused(rectified, inputs.grid) * fusion.fused_scale[:2, None, None]
    torch.testing.assert_close(fused, rectified + added, rtol=1e-4, atol=1e-5)


@every_count
@pytest.mark.parametrize("fuse", ["add", "none"])
def test_absent_sensors_are_not_read(modalities, fuse):
    check_absent_sensors(trained(modalities, fuse=fuse))


def test_absent_sensors_are_not_read_in_training_nor_behind_class_tokens():
    check_absent_sensors(trained(2).train(), prefix=1)


@every_count
def test_the_one_map_of_a_lone_sensor_is_its_stream(modalities):
    fusion = trained(modalities, fuse="map")
    present = every_presence(modalities)
    streams, inputs = random_streams(modalities, present.shape[1])
    maps = []
    for content in (1.0, float("nan")):
        given = replace(inputs, present=present)
        maps.append(fusion.fused_map(streams.masked_fill(~present[:, :, None, None], content), given))
    assert torch.equal(*maps) and torch.isfinite(maps[0]).all()
    for image in (present.sum(dim=0) == 1).nonzero().flatten().tolist():
        assert torch.equal(maps[0][image], streams[present[:, image], image][0])
    torch.testing.assert_close(maps[0][-1:], fusion.fused_map(streams, inputs)[-1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fuse", ["add", "map", "none"])
def test_every_parameter_gets_a_gradient(fuse):
    fusion = trained(3, fuse=fuse).train()
    streams, inputs = random_streams(3)
    streams.requires_grad_()
    rectified, _ = fusion(streams, inputs)
    loss = (rectified * torch.randn_like(rectified)).sum()
    if fuse == "map":
        fused = fusion.fused_map(rectified, inputs)
        loss = loss + (fused * torch.randn_like(fused)).sum()
    loss.backward()
    assert not [name for name, p in fusion.named_parameters() if p.grad is None or not p.grad.any()]
    assert streams.grad.any()


def test_neighbours_and_class_tokens():
    streams, inputs = random_streams(prefix=2)
    fusion = trained(2)
    fused = fusion(streams, inputs)[0]
    assert torch.equal(fused[:, :, :2], streams[:, :, :2])
    bare = replace(inputs, num_prefix_tokens=0)
    torch.testing.assert_close(fused[:, :, 2:], fusion(streams[:, :, 2:], bare)[0])
    turned = replace(inputs, grid=inputs.grid[::-1])
    assert not torch.allclose(fusion(streams, turned)[0], fused)


def test_starts_near_the_identity_or_as_released():
    streams, inputs = random_streams()
    fused = RectifyFuseFusion(2, HIDDEN)(streams, inputs)[0]
    torch.testing.assert_close(fused, streams, rtol=0, atol=0.06)
    released = RectifyFuseFusion(2, HIDDEN, start_gate=0.5, fuse="map")(streams, inputs)[0]
    torch.testing.assert_close(released, streams + streams.flip(0) / 2, rtol=0, atol=0.06)


def test_start_values_survive_a_model_around_them(tmp_path):
    host = hosted("rectify_fuse", start_gate=0.2, start_scale=0.3)
    torch.testing.assert_close(host.fusion.gates.channel_fc2.bias.sigmoid(), torch.full((2 * HIDDEN,), 0.2))
    assert torch.equal(host.fusion.fused_scale, torch.full((2, HIDDEN), 0.3))
    convs = host.fusion.channel_embed
    assert convs.residual.weight.std().item() == pytest.approx((2 / HIDDEN) ** 0.5, rel=0.1)
    assert convs.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.2)
    check_saved_and_loaded_equal(host, tmp_path)


@every_count
def test_images_do_not_see_each_other_and_bfloat16_comes_close(modalities):
    check_images_do_not_see_each_other(trained(modalities))
    check_bfloat16(trained(modalities))


@pytest.mark.parametrize("modalities", [2, 3])
def test_compiles_to_one_graph(modalities):
    check_compiles(trained(modalities))


@pytest.mark.slow
@pytest.mark.parametrize("modalities", [2, 3])
def test_exports_with_any_batch_size(modalities):
    check_exports(trained(modalities))


def test_heads_follow_the_width_and_bad_options_are_refused():
    heads = [RectifyFuseFusion(2, width, head_width=8).cross_path.num_heads for width in (8, 16, 40, 64)]
    assert heads == [1, 2, 5, 8] and RectifyFuseFusion(2, 64).cross_path.num_heads == 1
    with pytest.raises(ValueError, match="one of \\['add', 'map', 'none'\\], got 'sum'"):
        RectifyFuseFusion(2, HIDDEN, fuse="sum")
    with pytest.raises(ValueError, match="32 channels to split into heads of head_width=10"):
        RectifyFuseFusion(2, HIDDEN, head_width=10)
    with pytest.raises(ValueError, match="start_gate between 0 and 1"):
        RectifyFuseFusion(2, HIDDEN, start_gate=0.0)
    with pytest.raises(ValueError, match="has no option 'lambda_d'"):
        build_modality_fusion("rectify_fuse", 2, HIDDEN, {"lambda_d": 0.5})

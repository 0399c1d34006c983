"""Depth losses against their formulas written out pixel by pixel, and their promises about missing measurements."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

from vitweave.modeling.depth_losses import (
    DEPTH_LOSSES,
    DepthLoss,
    SigLoss,
    check_depth_labels,
    gradient_loss,
    l1_loss,
    scale_shift_invariant_loss,
    sig_loss,
)


def make_case(seed=0, size=(3, 1, 9, 11)):
    """Depths of 1 to 5 metres, predictions near them, a fifth of the pixels without a measurement."""
    generator = torch.Generator().manual_seed(seed)
    target = 1 + 4 * torch.rand(size, generator=generator)
    prediction = target * (0.7 + 0.6 * torch.rand(size, generator=generator))
    target[torch.rand(size, generator=generator) < 0.2] = 0
    return prediction, target


def naive_sig(prediction, target):
    seen = target > 0
    g = np.log(prediction[seen] + 1e-3) - np.log(target[seen] + 1e-3)
    return np.sqrt(g.var(ddof=1) + 0.15 * g.mean() ** 2)


def naive_gradient(prediction, target):
    total = 0.0
    for step in (1, 2, 4, 6):
        p, t = prediction[:, 0, ::step, ::step], target[:, 0, ::step, ::step]
        cost = 0.0
        for b, y, x in np.ndindex(p.shape):
            for other in ((b, y + 2, x), (b, y, x + 2)):
                if other[1] < p.shape[1] and other[2] < p.shape[2] and t[b, y, x] > 0 and t[other] > 0:
                    here, there = (np.log(p[i] + 1e-3) - np.log(t[i] + 1e-3) for i in ((b, y, x), other))
                    cost += abs(here - there)
        total += cost / (t > 0).sum()
    return total


def naive_l1(prediction, target):
    seen = target > 0
    return np.abs(prediction[seen] - target[seen]).mean()


def naive_scale_shift_invariant(prediction, target, weight=0.5):
    costs = []
    for p, t in zip(prediction[:, 0], target[:, 0], strict=True):
        seen = t > 0
        line = np.stack([p[seen], np.ones(seen.sum())], axis=1)
        scale, shift = np.linalg.lstsq(line, t[seen], rcond=None)[0]
        residual = scale * p + shift - t
        cost = (residual[seen] ** 2).sum() / (2 * seen.sum())
        for step in (1, 2, 4, 8):
            r, s = residual[::step, ::step], seen[::step, ::step]
            rows = (np.abs(r[1:] - r[:-1]) * (s[1:] & s[:-1])).sum()
            columns = (np.abs(r[:, 1:] - r[:, :-1]) * (s[:, 1:] & s[:, :-1])).sum()
            cost += weight * (rows + columns) / s.sum()
        costs.append(cost)
    return np.mean(costs)


NAIVE = {
    "gradient": (gradient_loss, naive_gradient),
    "l1": (l1_loss, naive_l1),
    "scale_shift_invariant": (scale_shift_invariant_loss, naive_scale_shift_invariant),
    "sig": (sig_loss, naive_sig),
}
ALL = dict.fromkeys(sorted(DEPTH_LOSSES), 1.0)


@pytest.mark.parametrize("name", sorted(NAIVE))
def test_losses_follow_their_formula(name):
    ours, naive = NAIVE[name]
    prediction, target = (part.double() for part in make_case())
    assert ours(prediction, target).item() == pytest.approx(naive(prediction.numpy(), target.numpy()), rel=1e-9)


def test_the_gradient_loss_sees_height_and_width():
    prediction, target = torch.full((1, 1, 8, 8), 2.0), torch.full((1, 1, 8, 8), 2.0)
    assert gradient_loss(prediction, target) == 0
    for axis in (2, 3):
        ramp = torch.linspace(1, 3, 8).reshape([8 if n == axis else 1 for n in range(4)])
        assert gradient_loss(prediction * ramp, target) > 0.1


def test_the_gradient_loss_sees_no_other_axis():
    one = gradient_loss(*make_case())
    many = gradient_loss(*(part.repeat(4, 1, 1, 1) for part in make_case()))
    torch.testing.assert_close(many, one)


def test_scale_and_shift_change_nothing():
    prediction, target = (part.double() for part in make_case())
    scales = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)[:, None, None, None]
    torch.testing.assert_close(
        scale_shift_invariant_loss(prediction * scales + 3 * scales - 1, target),
        scale_shift_invariant_loss(prediction, target),
    )
    shifted = torch.where(target > 0, 3 * target - 2, 1.0)
    assert scale_shift_invariant_loss(shifted, target).item() == pytest.approx(0, abs=1e-12)


def test_near_and_far_exchanged_is_wrong():
    _, target = make_case()
    right = scale_shift_invariant_loss(target + 1, target)
    assert scale_shift_invariant_loss(10 - target, target) > right + 0.5


@pytest.mark.parametrize("depth_target", ["metres", "disparity"])
@pytest.mark.parametrize("name", sorted(DEPTH_LOSSES))
@pytest.mark.parametrize("mark", [0.0, -1.0, float("nan"), float("inf"), -float("inf")])
def test_pixels_without_a_measurement_change_nothing(name, depth_target, mark):
    prediction, labels = make_case()
    loss = DepthLoss({name: 1.0}, depth_target=depth_target)
    expected = loss(prediction, labels[:, 0])
    unseen = labels == 0
    changed = torch.where(unseen, 9 * torch.rand_like(prediction), prediction).requires_grad_()
    found = loss(changed, labels.masked_fill(unseen, mark)[:, 0])
    torch.testing.assert_close(found, expected)
    found.backward()
    assert changed.grad.isfinite().all() and not changed.grad[unseen].any() and changed.grad[~unseen].any()


@pytest.mark.parametrize("depth_target", ["metres", "disparity"])
@pytest.mark.parametrize("name", sorted(DEPTH_LOSSES))
def test_images_without_depth_have_no_influence_and_are_counted(name, depth_target):
    prediction, labels = make_case()
    loss = DepthLoss({name: 1.0}, depth_target=depth_target).train()
    expected = DepthLoss({name: 1.0}, depth_target=depth_target)(prediction[:2], labels[:2, 0])
    labels[2] = float("nan")
    prediction.requires_grad_()
    found = loss(prediction, labels[:, 0])
    found.backward()
    torch.testing.assert_close(found, expected)
    assert not prediction.grad[2].any() and prediction.grad[:2].any()
    assert loss.images_without_depth == 1

    prediction = prediction.detach().requires_grad_()
    nothing = loss(prediction, torch.zeros_like(labels[:, 0]))
    nothing.backward()
    assert nothing == 0 and torch.equal(prediction.grad, torch.zeros_like(prediction))
    assert loss.images_without_depth == 4
    loss.eval()(prediction, torch.zeros_like(labels[:, 0]))
    assert loss.images_without_depth == 4


@pytest.mark.parametrize("name", sorted(DEPTH_LOSSES))
def test_a_single_measurement_and_a_perfect_or_flat_prediction_are_finite(name):
    loss = DepthLoss({name: 1.0})
    one = torch.zeros(1, 4, 5)
    one[0, 2, 3] = 2.0
    for values, labels in ((3.0, one), (2.0, one), (2.0, torch.full((1, 4, 5), 2.0)), (3.0, torch.rand(1, 4, 5) + 1)):
        prediction = torch.full((1, 1, 4, 5), values, requires_grad=True)
        found = loss(prediction, labels)
        found.backward()
        assert found.isfinite() and prediction.grad.isfinite().all()


def test_disparity_is_compared_with_inverse_metres():
    labels = torch.tensor([[[0.5, 2.0], [4.0, 0.0]]])
    prediction = torch.tensor([[[[2.0, 0.5], [0.25, 9.0]]]])
    assert DepthLoss({"l1": 1.0}, depth_target="disparity")(prediction, labels) == 0
    assert DepthLoss({"l1": 1.0})(prediction, labels) > 1
    affine = DepthLoss(depth_target="disparity")(3 * prediction + 1, labels)
    assert affine.item() == pytest.approx(0, abs=1e-6)


def test_the_sum_follows_its_weights():
    prediction, target = make_case()
    both = DepthLoss({"sig": 1, "gradient": 0.5})(prediction, target[:, 0])
    torch.testing.assert_close(both, sig_loss(prediction, target) + 0.5 * gradient_loss(prediction, target))
    smooth = DepthLoss({"scale_shift_invariant": 1}, {"scale_shift_invariant": {"gradient_weight": 0.0}})
    expected = scale_shift_invariant_loss(prediction, target, gradient_weight=0)
    assert torch.equal(smooth(prediction, target[:, 0]), expected)
    assert expected < scale_shift_invariant_loss(prediction, target)


def test_warm_up_leaves_the_variance_out_for_its_steps():
    prediction, target = make_case()
    loss = SigLoss(warm_up_steps=2).train()
    plain, warm = sig_loss(prediction, target), sig_loss(prediction, target, warm_up=True)
    assert warm < plain
    loss.eval()(prediction, target)  # evaluation takes no step
    assert [loss.train()(prediction, target).item() for _ in range(3)] == [warm, warm, plain]
    assert loss.eval()(prediction, target) == plain


def test_warm_up_goes_on_where_it_was_saved():
    prediction, target = make_case()
    first, second = (DepthLoss({"sig": 1.0}, {"sig": {"warm_up_steps": 3}}).train() for _ in range(2))
    for _ in range(2):
        first(prediction, target[:, 0])
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        assert torch.equal(first(prediction, target[:, 0]), second(prediction, target[:, 0]))
    assert second.terms["sig"].training_steps == 5


@pytest.mark.parametrize("name", sorted(DEPTH_LOSSES))
def test_half_precision_is_computed_in_float32(name):
    prediction, target = make_case()
    half = prediction.bfloat16().requires_grad_()
    loss = DepthLoss({name: 1.0})
    torch.testing.assert_close(loss(half, target[:, 0]), loss(half.detach().float(), target[:, 0]), rtol=0, atol=0)
    loss(half, target[:, 0]).backward()
    assert half.grad.dtype == torch.bfloat16 and half.grad.any()


def test_the_sum_compiles_to_one_graph():
    prediction, target = make_case()
    loss = DepthLoss(ALL, {"sig": {"warm_up_steps": 1}}).train()
    eager = [loss(prediction, target[:, 0]).item() for _ in range(2)]
    loss = DepthLoss(ALL, {"sig": {"warm_up_steps": 1}}).train()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert [compiled(prediction, target[:, 0]).item() for _ in range(2)] == pytest.approx(eager, rel=1e-5)
    assert eager[0] < eager[1]


def test_depths_out_of_range_are_told_once_with_their_figures(caplog):
    loss = DepthLoss(max_depth=10.0)
    prediction, labels = torch.full((1, 1, 4, 5), 2.0), torch.full((1, 4, 5), 2.0)
    with caplog.at_level(logging.WARNING):
        loss(prediction, labels)
        DepthLoss(depth_target="disparity")(prediction, labels * 1000)
        assert not caplog.messages
        labels[0, 0] = 2500.0
        loss(prediction, labels)
        loss(prediction, labels)
    (told,) = caplog.messages
    assert "0.001 to 10 metres" in told and "got 2 to 2500, with 25.0 %" in told and "millimetres" in told


def test_every_loss_is_a_module_without_weights():
    assert all(issubclass(loss, nn.Module) and not list(loss().parameters()) for loss in DEPTH_LOSSES.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": {"sigg": 1.0}}, "unknown depth loss 'sigg' .did you mean 'sig'"),
        ({"losses": {}}, "at least one loss"),
        ({"losses": {"l1": -1.0}}, "none of negative"),
        ({"losses": {"sig": 1.0}, "loss_options": {"sig": {"warmup": 3}}}, "no option 'warmup' .did you mean"),
        ({"losses": {"l1": 1.0}, "loss_options": {"l1": {"beta": 3}}}, r"no option 'beta'; its options: \[\]"),
        ({"losses": {"l1": 1.0}, "loss_options": {"sig": {}}}, "only losses that are in `losses`"),
        ({"loss_options": {"sig": {"warm_up_steps": -1}}}, "warm_up_steps >= 0, got -1"),
        (
            {"depth_target": "disparity", "loss_options": {"scale_shift_invariant": {"gradient_scales": 0}}},
            "gradient_scales >= 1, got 0.5 and 0",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DepthLoss(**options)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 1, 4, 4), r"2 images, got \(2, 1, 4, 4\); .* needs labels\[:, 0\]"),
        (torch.zeros(3, 4, 4), r"for 2 images, got \(3, 4, 4\)"),
        (torch.zeros(2, 4, 4, dtype=torch.int32), "floating-point labels, got torch.int32; .* from millimetres"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        check_depth_labels(labels, batch_size=2)

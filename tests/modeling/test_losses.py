"""Segmentation losses against per-pixel formulas written out in numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitweave.modeling.losses import LOSSES, CrossEntropyLoss, DiceLoss, FocalLoss, OhemLoss, SegmentationLoss

NUM_LABELS = 4
WEIGHTS = [0.5, 2.0, 1.0, 3.0]


def make_case(seed=0, size=(2, 5, 6)):
    """Logits (2, 4, 5, 6) and labels (2, 5, 6), a fifth of them ignored; class 3 occurs nowhere."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(size[0], NUM_LABELS, *size[1:], generator=generator)
    labels = torch.randint(0, NUM_LABELS - 1, size, generator=generator)
    labels[torch.rand(size, generator=generator) < 0.2] = 255
    return logits, labels


def valid_pixels(logits, labels):
    """(probabilities of all classes, label) of each valid pixel, as float64 numpy."""
    scores = logits.double().movedim(1, -1).reshape(-1, NUM_LABELS).numpy()
    truth = labels.flatten().numpy()
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return probabilities[truth != 255], truth[truth != 255]


def naive_cross_entropy(probabilities, truth, weights):
    costs = [-weights[t] * np.log(p[t]) for p, t in zip(probabilities, truth, strict=True)]
    return sum(costs) / sum(weights[t] for t in truth)


def naive_focal(probabilities, truth, weights):
    costs = [-weights[t] * (1 - p[t]) ** 2 * np.log(p[t]) for p, t in zip(probabilities, truth, strict=True)]
    return sum(costs) / sum(weights[t] for t in truth)


def naive_ohem(probabilities, truth, weights):
    order = sorted(range(len(truth)), key=lambda i: probabilities[i][truth[i]])[: int(np.ceil(len(truth) * 0.25))]
    return naive_cross_entropy(probabilities[order], truth[order], weights)


def naive_ohem_threshold(probabilities, truth, weights):
    own = [p[t] for p, t in zip(probabilities, truth, strict=True)]
    keep = max(sum(p < 0.7 for p in own), len(own) // 16)
    order = sorted(range(len(own)), key=lambda i: own[i])[:keep]
    return naive_cross_entropy(probabilities[order], truth[order], weights)


def naive_dice(probabilities, truth, weights):
    total = 0.0
    for label in np.unique(truth):
        overlap = probabilities[truth == label, label].sum()
        area = probabilities[:, label].sum() + (truth == label).sum()
        total += weights[label] * (1 - (2 * overlap + 1) / (area + 1))
    return total / sum(weights[label] for label in np.unique(truth))


NAIVE = {
    "cross_entropy": naive_cross_entropy,
    "focal": naive_focal,
    "ohem": naive_ohem,
    "ohem_threshold": naive_ohem_threshold,
    "dice": naive_dice,
}
OPTIONS = {"ohem": {"min_kept": 2}}


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_follow_their_formula(name, weights):
    logits, labels = make_case()
    loss = LOSSES[name](class_weights=weights, **OPTIONS.get(name, {}))
    expected = NAIVE[name](*valid_pixels(logits, labels), weights or [1.0] * NUM_LABELS)
    assert loss(logits, labels).item() == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_is_the_one_of_torch():
    logits, labels = make_case()
    expected = F.cross_entropy(logits, labels, weight=torch.tensor(WEIGHTS), ignore_index=255)
    torch.testing.assert_close(CrossEntropyLoss(class_weights=WEIGHTS)(logits, labels), expected)


@pytest.mark.parametrize("same", [FocalLoss(gamma=0.0), OhemLoss(fraction=1.0)])
def test_limits_are_cross_entropy(same):
    logits, labels = make_case()
    torch.testing.assert_close(same(logits, labels), CrossEntropyLoss()(logits, labels))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_ignored_pixels_change_nothing(name):
    logits, labels = make_case()
    loss = LOSSES[name](class_weights=WEIGHTS, **OPTIONS.get(name, {}))
    ignored = (labels == 255).unsqueeze(1).expand_as(logits)
    changed = torch.where(ignored, 30 * torch.randn_like(logits), logits).requires_grad_()
    torch.testing.assert_close(loss(changed, labels), loss(logits, labels), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(loss(changed, labels), changed)
    assert not gradient[ignored].any()
    assert gradient[~ignored].any()
    other = torch.where(labels == 255, 0, labels)  # any value may stand for "ignore", also one inside the label set
    assert not torch.equal(loss(logits, other), loss(logits, labels))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_ignore_index_may_be_a_class(name):
    logits, labels = make_case()
    relabelled = torch.where(labels == 255, NUM_LABELS - 1, labels)
    options = OPTIONS.get(name, {})
    with_class = LOSSES[name](ignore_index=NUM_LABELS - 1, **options)(logits, relabelled)
    torch.testing.assert_close(with_class, LOSSES[name](**options)(logits, labels))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_nothing_to_learn_is_a_zero_with_a_gradient(name):
    logits = torch.randn(2, NUM_LABELS, 4, 4, requires_grad=True)
    options = {"dice": {"smooth": 0.0}}.get(name, {})
    loss = LOSSES[name](**options)(logits, torch.full((2, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_extreme_logits_have_finite_gradients(name):
    labels = torch.tensor([[[0, 1], [2, 255]]])
    logits = torch.zeros(1, NUM_LABELS, 2, 2)
    logits[:, 0] = 1e4  # right and certain for one pixel, wrong and certain for two
    logits.requires_grad_()
    options = {"focal": {"gamma": 0.5}}.get(name, {})
    loss = LOSSES[name](**options)(logits, labels)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_half_precision_is_computed_in_float32(name):
    logits, labels = make_case()
    loss = LOSSES[name](class_weights=WEIGHTS, **OPTIONS.get(name, {}))
    half = logits.bfloat16().requires_grad_()
    torch.testing.assert_close(loss(half, labels), loss(half.detach().float(), labels), rtol=0, atol=0)
    loss(half, labels).backward()
    assert half.grad.dtype == torch.bfloat16
    assert half.grad.any()


def test_dice_of_a_perfect_prediction_is_zero():
    _, labels = make_case()
    logits = 50 * F.one_hot(labels.masked_fill(labels == 255, 0), NUM_LABELS).movedim(-1, 1).float()
    assert DiceLoss()(logits, labels).item() == pytest.approx(0, abs=1e-6)
    assert DiceLoss()(-logits, labels).item() > 0.5


@pytest.mark.parametrize(("fraction", "min_kept", "kept"), [(0.5, 0, 8), (0.3, 0, 5), (0.1, 6, 6), (0.1, 99, 16)])
def test_ohem_keeps_the_hardest_pixels(fraction, min_kept, kept):
    logits = torch.zeros(1, 2, 4, 5)
    logits[0, 1] = torch.randperm(20, generator=torch.Generator().manual_seed(0)).reshape(4, 5)  # wrong class
    logits.requires_grad_()
    labels = torch.zeros(1, 4, 5, dtype=torch.long)
    labels[0, 0, :4] = 255  # 16 valid pixels
    OhemLoss(fraction=fraction, min_kept=min_kept)(logits, labels).backward()
    touched = logits.grad[0, 1] != 0
    assert touched.sum() == kept
    by_cost = logits.detach()[0, 1].masked_fill(labels[0] == 255, -1).flatten().argsort(descending=True)
    assert touched.flatten()[by_cost[:kept]].all()


def test_the_sum_follows_its_weights():
    logits, labels = make_case()
    both = SegmentationLoss(NUM_LABELS, {"cross_entropy": 0.5, "dice": 2}, {"dice": {"smooth": 0.1}}, WEIGHTS)
    expected = 0.5 * CrossEntropyLoss(255, WEIGHTS)(logits, labels) + 2 * DiceLoss(255, WEIGHTS, 0.1)(logits, labels)
    torch.testing.assert_close(both(logits, labels), expected)


def test_the_sum_compiles_to_one_graph():
    logits, labels = make_case()
    loss = SegmentationLoss(NUM_LABELS, dict.fromkeys(LOSSES, 1.0), OPTIONS, WEIGHTS)
    torch.testing.assert_close(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, labels), loss(logits, labels)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": {"cross_entropie": 1.0}}, "did you mean 'cross_entropy'"),
        ({"losses": {}}, "at least one loss"),
        ({"losses": {"dice": 1.0}, "num_labels": 1}, "at least two labels"),
        ({"losses": {"dice": -1.0}}, "none of negative"),
        ({"losses": {"focal": 1.0}, "loss_options": {"focal": {"gama": 2}}}, "no option 'gama' .did you mean 'gamma'"),
        ({"losses": {"focal": 1.0}, "loss_options": {"focal": {"gamma": -1}}}, "gamma >= 0, got -1"),
        ({"losses": {"ohem": 1.0}, "loss_options": {"ohem": {"fraction": 1.5}}}, "0 <= fraction <= 1"),
        ({"losses": {"dice": 1.0}, "loss_options": {"dice": {"smooth": -1}}}, "smooth >= 0"),
        ({"losses": {"dice": 1.0}, "loss_options": {"focal": {}}}, "only losses that are in `losses`"),
        ({"losses": {"dice": 1.0}, "class_weights": [1.0, 2.0]}, "4 in all, got 2"),
        ({"losses": {"dice": 1.0}, "class_weights": [1.0, 2.0, float("nan"), 1.0]}, "finite"),
    ],
)
def test_misspelt_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SegmentationLoss(**{"num_labels": NUM_LABELS} | options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda labels: labels.masked_fill(labels == 1, 7),
            r"class ids 0 to 3 .num_labels=4. or ignore_index=255 .* got \[7\]",
        ),
        (lambda labels: labels.masked_fill(labels == 0, -1), r"got \[-1\]"),
        (lambda labels: labels[:, :4], r"\(2, 5, 6\), got \(2, 4, 6\)"),
        (lambda labels: labels[:, None], r"got \(2, 1, 5, 6\)"),
        (lambda labels: labels.float(), "integer class ids as labels, got torch.float32"),
    ],
)
def test_labels_that_do_not_fit_are_refused(change, message):
    logits, labels = make_case()
    with pytest.raises(ValueError, match=message):
        SegmentationLoss(NUM_LABELS, {"cross_entropy": 1.0})(logits, change(labels))


def test_labels_of_any_integer_type_are_fine():
    logits, labels = make_case()
    loss = SegmentationLoss(NUM_LABELS, dict.fromkeys(LOSSES, 1.0))
    torch.testing.assert_close(loss(logits, labels.to(torch.uint8)), loss(logits, labels))

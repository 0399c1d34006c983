"""Protocols: published windows, alignment that undoes what it should, names that tell what was changed."""

import numpy as np
import pytest

from vitweave.training.depth_metrics import DepthMetrics
from vitweave.training.depth_protocols import DEPTH_PROTOCOLS, DepthProtocol, find_protocol

rng = np.random.default_rng(0)
TRUTH = rng.uniform(1, 9, (24, 32))


def measure(protocol, prediction, truth=TRUTH):
    metrics = DepthMetrics(protocol)
    metrics.update(prediction, truth)
    return metrics.compute()


@pytest.mark.parametrize(
    ("name", "size", "window"),
    [
        ("nyu_eigen", (480, 640), (45, 471, 41, 601)),
        ("nyu_eigen", (192, 256), (18, 188, 16, 240)),
        ("nyu", (480, 640), (0, 480, 0, 640)),
        ("kitti_garg", (375, 1242), (153, 371, 44, 1197)),  # as np.array([...]).astype(np.int32) gives them
        ("kitti_eigen", (375, 1242), (124, 342, 44, 1197)),
    ],
)
def test_windows_are_the_published_ones(name, size, window):
    rows, columns = DEPTH_PROTOCOLS[name].window(*size)
    assert (rows.start, rows.stop, columns.start, columns.stop) == window


def test_only_the_window_counts():
    truth = np.full((480, 640), 4.0)
    prediction = np.full((480, 640), 8.0)
    prediction[45:471, 41:601] = 5.0
    assert measure("nyu_eigen", prediction, truth)["abs_rel"] == pytest.approx(0.25)
    assert measure("nyu", prediction, truth)["abs_rel"] > 0.3
    assert measure("kitti_garg", np.full((480, 640), 60.0), np.full((480, 640), 75.0))["abs_rel"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        ("median_scaled", 0.37 * TRUTH),
        ("affine_invariant", 0.2 * TRUTH - 5),
        ("affine_invariant", -TRUTH),
        ("affine_invariant_disparity", 30 / TRUTH + 7),
        ("affine_invariant_disparity", (3 / TRUTH - 1).astype(np.float32)),
    ],
)
def test_alignment_undoes_what_it_is_for(name, prediction):
    found = measure(name, prediction)
    assert found["abs_rel"] < 1e-5 and found["a1"] == 1 and found["protocol"] == name
    assert measure("nyu", prediction)["abs_rel"] > 0.1


def test_least_squares_is_that_of_numpy_on_the_counted_pixels():
    prediction = TRUTH + rng.normal(0, 1, TRUTH.shape)
    truth = np.where(rng.random(TRUTH.shape) < 0.3, 0, TRUTH)
    counted = truth > 0
    scale, shift = np.polyfit(prediction[counted], truth[counted], 1)
    expected = measure("nyu", scale * prediction + shift, truth)
    found = measure("affine_invariant", prediction, truth)
    assert found["rmse"] == pytest.approx(expected["rmse"], rel=1e-10)


def test_disparity_that_aligns_below_zero_is_far_away():
    truth = np.array([[1.0, 2.0, 9.9]])
    found = measure("affine_invariant_disparity", np.array([[1.0, 0.5, -0.5]]), truth)
    assert np.isfinite(found["rmse"])


@pytest.mark.parametrize("name", ["median_scaled", "affine_invariant", "affine_invariant_disparity"])
def test_alignment_survives_constant_predictions_and_missing_labels(name):
    assert np.isfinite(measure(name, np.ones_like(TRUTH))["abs_rel"])
    assert np.isfinite(measure(name, np.zeros_like(TRUTH))["abs_rel"])
    assert measure(name, TRUTH, np.zeros_like(TRUTH))["images_without_depth"] == 1


def test_variants_say_what_they_changed():
    nyu = DEPTH_PROTOCOLS["nyu_eigen"]
    assert nyu.variant(flip=True).name == "nyu_eigen_flip"
    assert nyu.variant(alignment="median", max_depth=5.0).name == "nyu_eigen_alignment_median_max_depth_5.0"
    assert nyu.variant(max_depth=10.0) == nyu and nyu.variant(name="ours", flip=True).name == "ours"
    with pytest.raises(ValueError, match=r"unknown fields \['cap'\]"):
        nyu.variant(cap=5)


def test_unknown_and_impossible_protocols_are_refused():
    assert find_protocol("nyu") is DEPTH_PROTOCOLS["nyu"] and find_protocol(DEPTH_PROTOCOLS["nyu"]).name == "nyu"
    with pytest.raises(ValueError, match=r"'nyuv2'; known: \['affine_invariant'"):
        find_protocol("nyuv2")
    for options in ({"min_depth": 0}, {"max_depth": 1e-9}, {"alignment": "mean"}, {"prediction": "log"}):
        with pytest.raises(ValueError):
            DepthProtocol("x", **options)

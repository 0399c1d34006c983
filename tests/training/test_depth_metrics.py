"""Depth metrics against the literal formulas, image by image."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vitweave.training.depth_metrics import DEPTH_METRICS, DepthMetrics, depth_metrics, predicted_depth_at_labels
from vitweave.training.depth_protocols import DEPTH_PROTOCOLS


def literal(prediction, target, low=0.0, high=np.inf):
    """The published formulas on the valid pixels of one image, one after the other, in float64."""
    valid = (target > low) & (target < high)
    p, t = prediction[valid].astype(np.float64), target[valid].astype(np.float64)
    ratio, g = np.maximum(p / t, t / p), np.log(p) - np.log(t)
    return {
        "abs_rel": np.mean(np.abs(p - t) / t),
        "sq_rel": np.mean((p - t) ** 2 / t),
        "rmse": np.sqrt(np.mean((p - t) ** 2)),
        "log10": np.mean(np.abs(np.log10(p) - np.log10(t))),
        "rmse_log": np.sqrt(np.mean(g**2)),
        "silog": 100 * np.std(g),
        "a1": np.mean(ratio < 1.25),
        "a2": np.mean(ratio < 1.25**2),
        "a3": np.mean(ratio < 1.25**3),
    }


def random_depth(count=3, height=170, width=130, seed=0, holes=0.3, dtype=np.float64):
    """Labels with holes and predictions that are off by some ten percent; several blocks of pixels."""
    rng = np.random.default_rng(seed)
    labels = rng.uniform(0.5, 9.5, (count, height, width))
    predictions = labels * np.exp(rng.normal(0.05, 0.25, labels.shape))
    labels[rng.random(labels.shape) < holes] = 0
    return predictions.astype(dtype), labels.astype(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-5)])
@pytest.mark.parametrize("holes", [0.0, 0.3, 0.999])
def test_the_mean_over_images_of_the_literal_formulas(dtype, tolerance, holes):
    predictions, labels = random_depth(holes=holes, dtype=dtype)
    metrics = DepthMetrics("nyu")
    metrics.update(torch.from_numpy(predictions[:1]), torch.from_numpy(labels[:1]))
    metrics.update(predictions[1:], labels[1:])
    found = metrics.compute()
    expected = [literal(p.clip(1e-3, 10), t, 1e-3, 10) for p, t in zip(predictions, labels, strict=True)]
    for name in DEPTH_METRICS:
        np.testing.assert_allclose(found[name], np.mean([one[name] for one in expected]), rtol=tolerance, err_msg=name)
    assert (found["protocol"], found["images"], found["images_without_depth"]) == ("nyu", 3, 0)


def test_all_pixels_at_once_without_a_protocol():
    predictions, labels = random_depth()
    predictions[0, 0, 0], labels[0, 0, 0] = 900.0, 800.0  # nothing is capped
    found = depth_metrics(torch.from_numpy(predictions)[:, None], torch.from_numpy(labels)[:, None])
    expected = literal(predictions, labels)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name
    with pytest.raises(ValueError, match="equal shapes"):
        depth_metrics(torch.ones(2, 3), torch.ones(3, 2))


def test_the_thresholds_themselves_are_not_within():
    found = depth_metrics(torch.tensor([1.25, 1.5625, 1.953125, 1.2]), torch.ones(4))
    assert (found["a1"], found["a2"], found["a3"]) == (0.25, 0.5, 0.75)


def test_labels_beyond_the_cap_do_not_count_and_predictions_are_clamped():
    metrics = DepthMetrics(DEPTH_PROTOCOLS["nyu"].variant(max_depth=5.0))
    metrics.update(torch.tensor([[100.0, -3.0, 2.0]]), torch.tensor([[4.0, 7.0, 2.0]]))
    found = metrics.compute()
    assert found["protocol"] == "nyu_max_depth_5.0"
    assert found["abs_rel"] == pytest.approx(0.125) and found["a1"] == 0.5  # 5 for 4 m is just not within 1.25


@pytest.mark.parametrize("nothing", [0.0, -1.0, -100.0, np.nan, np.inf, 11.0])
def test_images_without_depth_are_counted_and_left_out(nothing):
    predictions, labels = random_depth()
    whole = DepthMetrics("nyu")
    whole.update(predictions[:2], labels[:2])
    labels[2] = nothing
    metrics = DepthMetrics("nyu")
    metrics.update(predictions, labels)
    assert metrics.compute() == whole.compute() | {"images_without_depth": 1}
    metrics.reset()
    metrics.update(predictions[2], labels[2])
    found = metrics.compute()
    assert np.isnan(found["abs_rel"]) and (found["images"], found["images_without_depth"]) == (0, 1)


def test_image_by_image():
    predictions, labels = random_depth()
    labels[1] = 0
    metrics = DepthMetrics("nyu")
    values, counted = metrics.per_image(predictions, labels)
    assert counted.tolist() == [True, False, True] and values["abs_rel"][1] == 0
    clamped = predictions.clip(1e-3, 10)
    expected = [literal(clamped[index], labels[index], 1e-3, 10)["abs_rel"] for index in (0, 2)]
    np.testing.assert_allclose(values["abs_rel"][[0, 2]], expected, rtol=1e-12)


def test_what_does_not_count_may_hold_anything():
    predictions, labels = random_depth()
    clean = DepthMetrics("nyu")
    clean.update(predictions, labels)
    rng = np.random.default_rng(1)
    holes = labels == 0
    labels[holes] = rng.choice([np.nan, np.inf, -np.inf, -5, 0, 70], holes.sum())
    predictions[holes] = rng.choice([np.nan, np.inf, -np.inf, 0], holes.sum())
    dirty = DepthMetrics("nyu")
    dirty.update(predictions, labels)
    for name in DEPTH_METRICS:
        assert dirty.compute()[name] == pytest.approx(clean.compute()[name], rel=1e-12)


def test_a_broken_model_shows():
    predictions, labels = random_depth()
    predictions[1, 5, 5], labels[1, 5, 5] = np.nan, 2.0
    metrics = DepthMetrics("nyu")
    metrics.update(predictions, labels)
    assert np.isnan(metrics.compute()["rmse"]) and metrics.images == 3


def test_trainer_callable_names_the_protocol_and_starts_afresh():
    predictions, labels = random_depth(dtype=np.float32)
    metrics = DepthMetrics("nyu")
    batches = [
        SimpleNamespace(predictions=p[None], label_ids=t[None]) for p, t in zip(predictions, labels, strict=True)
    ]
    for _ in range(2):
        steps = [metrics(batch, compute_result=batch is batches[-1]) for batch in batches]
        assert steps[:2] == [{}, {}]
        assert steps[2] == DepthMetrics("nyu")(SimpleNamespace(predictions=predictions, label_ids=labels))
    assert {"nyu_abs_rel", "nyu_a1", "nyu_silog", "nyu_images", "nyu_images_without_depth"} < set(steps[2])
    assert all(isinstance(value, (int, float)) for value in steps[2].values())
    with pytest.raises(ValueError, match=r"nyu_flip averages .* evaluate_depth"):
        DepthMetrics(DEPTH_PROTOCOLS["nyu"].variant(flip=True))(batches[0])


def test_predictions_of_another_size_are_resized_or_refused():
    labels = torch.ones(2, 4, 8)
    assert predicted_depth_at_labels((torch.full((2, 2, 4), 3.0), None), labels).shape == (2, 4, 8)
    assert predicted_depth_at_labels(labels, labels) is labels
    for shape in [(2, 2, 4), (2, 1, 4, 8)]:
        with pytest.raises(ValueError, match=r"one shape .* predicted_depth_at_labels"):
            DepthMetrics("nyu").update(torch.ones(shape), labels)
    half = DepthMetrics("nyu")
    half.update(labels.bfloat16(), labels)
    assert half.compute()["rmse"] == 0


def test_the_trainer_streams_them(tmp_path):
    from transformers import Trainer, TrainingArguments

    class Depth(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 1, 2, stride=2)

        def forward(self, pixel_values, labels=None):
            depth = self.layer(pixel_values)[:, 0].exp()
            return {"loss": depth.mean(), "predicted_depth": depth, "hidden_states": (pixel_values,)}

    generator = torch.Generator().manual_seed(0)
    items = [
        {"pixel_values": torch.randn(3, 16, 24, generator=generator), "labels": torch.ones(16, 24) * index}
        for index in range(5)
    ]
    options = {"batch_eval_metrics": True, "label_names": ["labels"], "report_to": "none", "use_cpu": True}
    args = TrainingArguments(tmp_path, per_device_eval_batch_size=2, remove_unused_columns=False, **options)
    trainer = Trainer(
        Depth(),
        args,
        eval_dataset=items,
        compute_metrics=DepthMetrics("nyu"),
        preprocess_logits_for_metrics=predicted_depth_at_labels,
    )
    found = trainer.evaluate()
    assert (found["eval_nyu_images"], found["eval_nyu_images_without_depth"]) == (4, 1)
    direct = DepthMetrics("nyu")
    for item in items:
        depth = trainer.model(item["pixel_values"][None])["predicted_depth"]
        direct.update(predicted_depth_at_labels(depth, item["labels"][None]), item["labels"][None])
    assert found["eval_nyu_abs_rel"] == pytest.approx(direct.compute()["abs_rel"], rel=1e-5)
    assert found == trainer.evaluate() | {key: found[key] for key in found if "nyu" not in key}

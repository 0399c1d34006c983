"""Metrics against the formula of `evaluate`'s public mean_iou, image by image."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vitweave.training.metrics import ConfusionMatrix, SegmentationMetrics, predicted_classes


def public_mean_iou(predictions, labels, num_labels, ignore_index):
    """The formula of the Hub's mean_iou metric: three histograms per image, summed."""
    total = np.zeros((3, num_labels))
    for prediction, label in zip(predictions, labels, strict=True):
        counted = label != ignore_index
        prediction, label = prediction[counted], label[counted]
        parts = (prediction[prediction == label], prediction, label)
        total += [np.histogram(part, bins=num_labels, range=(0, num_labels - 1))[0] for part in parts]
    hits, predicted, true = total
    with np.errstate(invalid="ignore"):
        iou, accuracy = hits / (predicted + true - hits), hits / true
    return np.nanmean(iou), hits.sum() / true.sum(), np.nanmean(accuracy), iou


def random_maps(num_labels, count=4, size=40, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_labels, (count, size, size))
    predictions = np.where(rng.random(labels.shape) < 0.6, labels, rng.integers(0, num_labels, labels.shape))
    labels[rng.random(labels.shape) < 0.2] = 255
    return predictions, labels


@pytest.mark.parametrize("num_labels", [2, 11, 150])
def test_streaming_equals_the_public_formula(num_labels):
    predictions, labels = random_maps(num_labels)
    confusion = ConfusionMatrix(num_labels)
    for prediction, label in zip(predictions, labels, strict=True):
        confusion.update(prediction, label.astype(np.uint8))
    found = confusion.compute()
    mean_iou, pixel_accuracy, mean_accuracy, iou = public_mean_iou(predictions, labels, num_labels, 255)
    np.testing.assert_allclose(
        [found["mean_iou"], found["pixel_accuracy"], found["mean_accuracy"]],
        [mean_iou, pixel_accuracy, mean_accuracy],
        rtol=1e-12,
    )
    np.testing.assert_allclose(found["per_class_iou"], iou, rtol=1e-12)


@pytest.mark.parametrize("ignore_index", [255, -1, 70000, 3, 300])
@pytest.mark.parametrize("num_labels", [5, 280])
def test_every_ignore_index_leaves_its_pixels_out(ignore_index, num_labels):
    predictions, labels = random_maps(num_labels)
    labels[labels == 255] = 0
    labels[:, :9] = ignore_index
    confusion = ConfusionMatrix(num_labels, ignore_index)
    confusion.update(predictions, labels)
    expected = public_mean_iou(predictions, labels, num_labels, ignore_index)
    assert confusion.compute()["mean_iou"] == pytest.approx(expected[0], rel=1e-12)


def test_absent_classes_do_not_count():
    confusion = ConfusionMatrix(4)
    confusion.update(torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 1]]))
    found = confusion.compute()
    assert found["mean_iou"] == 0.5 and np.isnan(found["per_class_iou"][2:]).all()


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [([[0, 3]], [[0, 1]], "predictions from 0 to 2"), ([[0, 1]], [[0, 7]], "labels"), ([[0]], [[0, 1]], "as large")],
)
def test_bad_maps_are_refused(prediction, label, message):
    with pytest.raises(ValueError, match=message):
        ConfusionMatrix(3).update(torch.tensor(prediction), torch.tensor(label))


def test_trainer_callable_gives_batches_together_and_starts_afresh():
    predictions, labels = random_maps(3)
    labels[0, 0, 0] = -100  # what the Trainer pads with between processes
    metrics = SegmentationMetrics(3, id2label={0: "sky", 1: "road", 2: "car"})
    batches = [SimpleNamespace(predictions=p, label_ids=lab) for p, lab in zip(predictions, labels, strict=True)]
    whole = SimpleNamespace(predictions=predictions, label_ids=labels)
    for _ in range(2):
        steps = [metrics(batch, compute_result=batch is batches[-1]) for batch in batches]
        assert steps[:-1] == [{}] * 3
        assert steps[-1] == SegmentationMetrics(3, id2label={0: "sky", 1: "road", 2: "car"})(whole)
    assert {"mean_iou", "pixel_accuracy", "mean_accuracy", "iou_sky", "iou_road", "iou_car"} == set(steps[-1])


def test_coarse_logits_are_resized_to_the_labels():
    logits = torch.tensor([[[[9.0, 0.0]], [[0.0, 9.0]]]])  # (1, 2, 1, 2)
    assert predicted_classes((logits, None), torch.zeros(1, 2, 4)).tolist() == [[[0, 0, 1, 1], [0, 0, 1, 1]]]


def test_the_evaluate_metric_works_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from vitweave.training.mean_iou_metric import MeanIoU

    predictions, labels = random_maps(5)
    metric = MeanIoU(num_labels=5, cache_dir=str(tmp_path))
    metric.add_batch(predictions=predictions[:2], references=labels[:2])
    metric.add_batch(predictions=predictions[2:], references=labels[2:])
    expected = public_mean_iou(predictions, labels, 5, 255)
    assert metric.compute()["mean_iou"] == pytest.approx(expected[0], rel=1e-12)

"""Accuracy from counts equals accuracy from all images at once."""

import math
from types import SimpleNamespace

import pytest
import torch

from vitweave.training.classification_metrics import Accuracy, ClassificationMetrics, RankedClasses


def test_batches_add_up_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 7, generator=generator), torch.randint(6, (200,), generator=generator)
    metrics = ClassificationMetrics(7, {0: "cat"})
    for chunk, truth in zip(logits.split(33), labels.split(33), strict=True):
        batch = SimpleNamespace(predictions=RankedClasses()(chunk, truth), label_ids=truth)
        assert metrics(batch, compute_result=False) == {}
        assert metrics.counts.counts.numel() == 21  # memory does not grow
    found = metrics(SimpleNamespace(predictions=torch.zeros(1, 5), label_ids=torch.tensor([-100])))
    assert found["accuracy"] == pytest.approx((logits.argmax(dim=1) == labels).double().mean().item())
    top5 = (logits.argsort(dim=1, descending=True)[:, :5] == labels[:, None]).any(dim=1)
    assert found["top5_accuracy"] == pytest.approx(top5.double().mean().item())
    per_class = [(logits.argmax(dim=1) == labels)[labels == index].double().mean().item() for index in range(6)]
    assert found["accuracy_cat"] == pytest.approx(per_class[0])
    assert found["mean_class_accuracy"] == pytest.approx(sum(per_class) / 6) and math.isnan(found["accuracy_6"])
    assert not metrics.counts.counts.any()  # ready for the next evaluation


def test_few_classes_have_no_top5():
    accuracy = Accuracy(3)
    accuracy.update(RankedClasses()(torch.eye(3)), torch.tensor([0, 1, 0]))
    assert "top5_accuracy" not in accuracy.compute() and accuracy.compute()["accuracy"] == pytest.approx(2 / 3)


def test_bad_input_is_refused():
    accuracy = Accuracy(3)
    with pytest.raises(ValueError, match="0 to 2, got 1 to 3"):
        accuracy.update(torch.zeros(2, 3), torch.tensor([1, 3]))
    with pytest.raises(ValueError, match=r"expected ranked classes \(batch, k\)"):
        accuracy.update(torch.zeros(2), torch.tensor([1, 2]))
    assert not accuracy.counts.any()

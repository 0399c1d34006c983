"""Classification accuracy from counts per class; memory does not grow with the images."""

import torch
from torch import Tensor

PADDING_INDEX = -100  # the Trainer fills labels with it; such images are left out


class Accuracy:
    """Counts of images, top-1 hits and top-k hits per true class.

    Args:
        k: the true class among the k highest logits counts as a top-k hit; left out where there are not more classes.
    """

    def __init__(self, num_labels: int, k: int = 5):
        self.num_labels, self.k = num_labels, k
        self.reset()

    def reset(self) -> None:
        self.counts = torch.zeros(3, self.num_labels, dtype=torch.int64)  # rows: images, top-1 hits, top-k hits

    def update(self, ranked: Tensor, labels: Tensor) -> None:
        """Add images.

        Args:
            ranked: (batch, k or more) class ids, the most likely first, as `ranked_classes` gives them.
            labels: (batch,) true class ids.
        """
        ranked, labels = torch.as_tensor(ranked).long(), torch.as_tensor(labels).long()
        if ranked.ndim != 2 or labels.ndim != 1 or len(ranked) != len(labels):
            raise ValueError(
                f"expected ranked classes (batch, k) and labels (batch,), got {tuple(ranked.shape)} and "
                f"{tuple(labels.shape)}"
            )
        kept = labels != PADDING_INDEX
        ranked, labels = ranked[kept], labels[kept]
        if not len(labels):
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.num_labels:
            raise ValueError(f"expected labels from 0 to {self.num_labels - 1}, got {low} to {high}; check num_labels")
        hits = ranked[:, : self.k] == labels[:, None]
        for row, chosen in enumerate((labels, labels[hits[:, 0]], labels[hits.any(dim=1)])):
            self.counts[row] += chosen.bincount(minlength=self.num_labels).to(self.counts.device)

    def compute(self) -> dict:
        """accuracy, mean_class_accuracy, per_class (num_labels values, NaN for absent classes), top<k>_accuracy."""
        images, hits, top_hits = self.counts.double()
        per_class = hits / images  # 0 / 0 = NaN: a class without images has no accuracy
        found = {
            "accuracy": (hits.sum() / images.sum()).item(),
            "mean_class_accuracy": per_class.nanmean().item(),
            "per_class": per_class.tolist(),
        }
        if self.k < self.num_labels:
            found[f"top{self.k}_accuracy"] = (top_hits.sum() / images.sum()).item()
        return found


class RankedClasses:
    """`preprocess_logits_for_metrics` of the Trainer: the ids of the k highest logits, (batch, k)."""

    def __init__(self, k: int = 5):
        self.k = k

    def __call__(self, logits, labels: Tensor | None = None) -> Tensor:
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        return logits.topk(min(self.k, logits.shape[-1]), dim=-1).indices


class ClassificationMetrics:
    """`compute_metrics` of the Trainer with `batch_eval_metrics=True`: between batches it keeps only counts.

    Args:
        id2label: names under which the accuracy of each class is reported as `accuracy_<name>`.
    """

    def __init__(self, num_labels: int, id2label: dict[int, str] | None = None, k: int = 5):
        self.counts = Accuracy(num_labels, k)
        self.names = [(id2label or {}).get(index, str(index)) for index in range(num_labels)]

    def __call__(self, prediction, compute_result: bool = True) -> dict[str, float]:
        self.counts.update(prediction.predictions, prediction.label_ids)
        if not compute_result:
            return {}
        metrics = self.counts.compute()
        self.counts.reset()
        per_class = metrics.pop("per_class")
        return {**metrics, **{f"accuracy_{name}": value for name, value in zip(self.names, per_class, strict=True)}}

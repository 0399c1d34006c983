"""What frozen features are worth: weighted k nearest neighbours and the input of linear probes (DINOv2's protocols)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_scores(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    num_classes: int,
    ks: tuple[int, ...] = (10, 20, 100, 200),
    temperature: float = 0.07,
    max_k: int = 200,
) -> dict[int, Tensor]:
    """Class scores by the nearest training images in cosine similarity, for several k at once.

    The similarities of the `max_k` nearest are soft-maxed once; the scores for k sum the first k weights by class.

    Args:
        train: (train images, hidden); train_labels: (train images,) class ids; test: (test images, hidden).

    Returns:
        k -> (test images, num_classes).
    """
    if max(ks) > max_k:
        raise ValueError(f"expected every k up to max_k={max_k}, got {ks}")
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    nearest, indices = similarity.topk(min(max_k, len(train)), dim=1)
    weights = (nearest / temperature).softmax(dim=1)
    classes, empty = train_labels[indices], weights.new_zeros(len(test), num_classes)
    return {k: empty.scatter_add(1, classes[:, :k], weights[:, :k]) for k in ks}


def linear_probe_input(cls_tokens: list[Tensor], last_patches: Tensor | None = None) -> Tensor:
    """The class tokens of the last layers side by side, followed by the mean patch of the last one if given.

    Args:
        cls_tokens: (batch, hidden) each, after the final norm, in the order of the layers.
        last_patches: (batch, patches, hidden).
    """
    parts = [*cls_tokens] if last_patches is None else [*cls_tokens, last_patches.mean(dim=1)]
    return torch.cat(parts, dim=1)

"""k nearest neighbours on frozen features (DINOv2's protocol, arXiv:2304.07193)."""

import logging
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from vitweave.modeling.vision_encoder import VisionEncoder
from vitweave.training.probe_features import EncodedImages, PooledEncoder, compute_features, count_classes, label_names
from vitweave.training.probing import knn_scores

logger = logging.getLogger(__name__)

SIMILARITIES_AT_ONCE = 2**24  # 64 MiB of float32


def evaluate_knn(
    encoder: VisionEncoder,
    train_dataset: Dataset | EncodedImages,
    test_dataset: Dataset | EncodedImages,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    batch_size: int = 32,
    num_workers: int = 0,
    progress: bool = True,
) -> dict[int, float]:
    """Classify every test image by the k most similar training images; nothing is trained.

    The feature is the class token after the final norm, of encoders without one the pooled output.

    Returns:
        k -> accuracy. Where there are fewer than k training images, all of them vote, and a warning says so.
    """
    pooled = PooledEncoder(encoder)
    id2label = label_names(train_dataset, test_dataset)
    options = {"batch_size": batch_size, "num_workers": num_workers, "progress": progress}
    train, labels = compute_features(pooled, train_dataset, description="training features", **options)
    test, truth = compute_features(pooled, test_dataset, description="test features", **options)
    num_labels = count_classes([labels, truth], id2label)
    vectors = (train["class_tokens"][-1], labels, test["class_tokens"][-1], truth)
    return knn_accuracy(*vectors, num_labels, ks, temperature, progress=progress)


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    num_labels: int,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    chunk_size: int | None = None,
    progress: bool = False,
) -> dict[int, float]:
    """Accuracy for each k of features that are there already.

    Args:
        train: (train images, hidden); train_labels: (train images,); test: (test images, hidden); test_labels: alike.
        chunk_size: test images at a time; None = as many as keep the similarities within 64 MiB, so that memory grows
            with neither set.
    """
    ks = tuple(sorted(set(ks)))
    if not ks or ks[0] < 1:
        raise ValueError(f"expected every k to be 1 or more, got {ks}")
    if ks[-1] > len(train):
        more = [k for k in ks if k > len(train)]
        logger.warning(f"there are {len(train)} training images, fewer than k = {more}: for these, all of them vote")
    chunk_size = chunk_size or max(1, SIMILARITIES_AT_ONCE // len(train))
    train = F.normalize(train.float(), dim=1)
    hits = dict.fromkeys(ks, 0)
    chunks = list(zip(test.float().split(chunk_size), test_labels.split(chunk_size), strict=True))
    for images, truth in tqdm(chunks, desc="k-NN", disable=not progress):
        scores = knn_scores(train, train_labels, images, num_labels, ks, temperature, max_k=max(200, ks[-1]))
        for k in ks:
            hits[k] += int((scores[k].argmax(dim=1) == truth).sum())
    return {k: count / len(test) for k, count in hits.items()}

"""k nearest neighbours: chunks change nothing, and bad k are named."""

import logging

import pytest
import torch
from transformers import ConvNextConfig, ViTConfig, ViTImageProcessorPil

from vitweave.modeling.vision_encoder import VisionEncoder
from vitweave.training.classification_data import ImageClassificationDataset
from vitweave.training.knn import evaluate_knn, knn_accuracy
from vitweave.training.probing import knn_scores
from vitweave.training.synthetic_classes import SyntheticClasses

PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def random_sets():
    torch.manual_seed(0)
    train, test = torch.randn(300, 8), torch.randn(50, 8)
    centres = torch.randn(4, 8)
    labels, truth = torch.randint(4, (300,)), torch.randint(4, (50,))
    return train + centres[labels], labels, test + centres[truth], truth


@pytest.mark.parametrize("chunk_size", [1, 7, 1000, None])
def test_chunks_change_nothing(chunk_size):
    train, labels, test, truth = random_sets()
    scores = knn_scores(train, labels, test, 4)
    expected = {k: (scores[k].argmax(dim=1) == truth).double().mean().item() for k in (10, 20, 100, 200)}
    found = knn_accuracy(train, labels, test, truth, 4, chunk_size=chunk_size)
    assert found == pytest.approx(expected) and 0.3 < min(found.values()) < 1


def test_scores_are_sums_of_one_softmax():
    train, labels, test, _ = random_sets()
    scores = knn_scores(train, labels, test, 4, ks=(3, 200))
    similarity = torch.cosine_similarity(test[:, None], train[None], dim=2)
    nearest = similarity.argsort(dim=1, descending=True)[:, :200]
    weights = (similarity.gather(1, nearest) / 0.07).softmax(dim=1)
    for k in (3, 200):
        votes = [[weights[i, j] * (labels[nearest[i, j]] == c) for j in range(k)] for i in range(2) for c in range(4)]
        expected = torch.tensor([sum(row) for row in votes]).view(2, 4)
        torch.testing.assert_close(scores[k][:2], expected)


def test_a_k_beyond_the_training_images_lets_all_vote(caplog):
    train, labels, test, truth = random_sets()
    with caplog.at_level(logging.WARNING):
        found = knn_accuracy(train[:50], labels[:50], test, truth, 4, ks=(50, 500))
    assert found[500] == found[50]
    assert "50 training images, fewer than k = [500]" in caplog.text


@pytest.mark.parametrize("ks", [(), (0, 10)])
def test_bad_k_are_refused(ks):
    with pytest.raises(ValueError, match="every k to be 1 or more"):
        knn_accuracy(*random_sets(), 4, ks=ks)


@pytest.mark.parametrize("config", [ViTConfig(**SMALL, intermediate_size=32), ConvNextConfig(hidden_sizes=[8] * 4)])
def test_neighbours_of_an_encoder(config):
    torch.manual_seed(0)
    encoder = VisionEncoder(config)
    train = ImageClassificationDataset(SyntheticClasses(12), PROCESSOR)
    again = ImageClassificationDataset(SyntheticClasses(12), PROCESSOR)
    assert evaluate_knn(encoder, train, again, ks=(1, 12), progress=False)[1] == 1.0  # each finds itself
    one = ImageClassificationDataset([SyntheticClasses(1)[0]], PROCESSOR)
    with pytest.raises(ValueError, match="at least two classes"):
        evaluate_knn(encoder, one, again, progress=False)

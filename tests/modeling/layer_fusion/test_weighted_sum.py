import pytest
import torch
from fusion_tokens import random_tokens

from vitweave.modeling.layer_fusion.weighted_sum import WeightedSumFusion


def test_weights_sum_to_one_and_fast_ones_to_slightly_less():
    softmax = WeightedSumFusion(4, 8)
    fast = WeightedSumFusion(4, 8, normalisation="fast")
    tokens = random_tokens(layers=4, hidden=8)
    assert softmax(tokens).layer_weights.sum().item() == pytest.approx(1)
    assert fast(tokens).layer_weights.sum().item() == pytest.approx(4 / (4 + 1e-4))


def test_starting_at_the_last_layer_gives_nearly_the_last_layer():
    tokens = random_tokens(layers=4, hidden=8)
    fusion = WeightedSumFusion(4, 8, start="last", norm="none", direct=True)
    torch.testing.assert_close(fusion(tokens).pooled, tokens.cls[:, -1], atol=2e-3, rtol=0)


def test_fast_weights_cannot_start_at_zero():
    with pytest.raises(ValueError, match="start"):
        WeightedSumFusion(4, 8, normalisation="fast", start="last")

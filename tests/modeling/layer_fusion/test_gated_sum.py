import torch
from fusion_tokens import random_tokens, trained

from vitweave.modeling.layer_fusion.gated_sum import GatedSumFusion


def test_softmax_gates_start_equal_and_sigmoid_ones_at_the_deepest_layer():
    tokens = random_tokens(layers=4)
    torch.testing.assert_close(GatedSumFusion(4, 32)(tokens).layer_weights, torch.full((2, 4), 0.25))
    gates = GatedSumFusion(4, 32, gate="sigmoid", granularity="channel")(tokens).layer_weights
    torch.testing.assert_close(gates, torch.tensor([-4.0, -4, -4, 0]).sigmoid().expand(2, 4))


def test_images_choose_their_layers_and_weights_sum_to_one():
    for granularity in ("layer", "channel"):
        weights = trained(GatedSumFusion(3, 32, granularity=granularity))(random_tokens()).layer_weights
        torch.testing.assert_close(weights.sum(1), torch.ones(2))
        assert not torch.allclose(weights[0], weights[1], atol=1e-3)

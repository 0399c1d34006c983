from dataclasses import replace

import pytest
import torch
from fusion_tokens import random_tokens, trained

from vitweave.modeling.layer_fusion.base import LayerTokens
from vitweave.modeling.layer_fusion.layer_self_attention import LayerSelfAttentionFusion


def turned(tokens: LayerTokens) -> LayerTokens:
    """The layers in the opposite order."""
    return replace(tokens, cls=tokens.cls.flip(1), patches=tokens.patches.flip(1))


@pytest.mark.parametrize("readout", ["fuse", "last", "mean"])
def test_the_order_of_the_layers_counts(readout):
    fusion = trained(LayerSelfAttentionFusion(3, 32, num_heads=4, readout=readout, norm="none"))
    tokens = random_tokens()
    assert not torch.allclose(fusion(turned(tokens)).pooled, fusion(tokens).pooled, atol=1e-3)


def test_without_layer_embeddings_the_mean_does_not_know_the_order():
    fusion = trained(LayerSelfAttentionFusion(3, 32, num_heads=4, readout="mean", norm="none"))
    torch.nn.init.zeros_(fusion.layer_embed)
    torch.testing.assert_close(fusion(turned(random_tokens())).pooled, fusion(random_tokens()).pooled)


def test_attentions_on_request_change_nothing():
    fusion = trained(LayerSelfAttentionFusion(3, 32, depth=2, num_heads=4, reads="cls+mean"))
    with_weights, without = fusion(random_tokens(), output_attentions=True), fusion(random_tokens())
    assert without.attentions is None and with_weights.attentions.shape == (2, 2, 4, 7, 7)
    torch.testing.assert_close(with_weights.pooled, without.pooled)
    torch.testing.assert_close(with_weights.attentions.sum(-1), torch.ones(2, 2, 4, 7))

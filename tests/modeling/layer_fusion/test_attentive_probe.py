from dataclasses import replace

import pytest
import torch
from fusion_tokens import random_tokens, trained

from vitweave.modeling.layer_fusion.attentive_probe import AttentiveProbeFusion


def test_one_head_per_token_where_the_width_allows_it():
    assert AttentiveProbeFusion(4, 32).num_heads == 8
    assert AttentiveProbeFusion(3, 32).num_heads == 4
    with pytest.raises(ValueError, match="num_heads"):
        AttentiveProbeFusion(3, 32, num_heads=6)


def test_attention_is_over_both_tokens_of_every_layer():
    fusion = trained(AttentiveProbeFusion(3, 32, query="cls"))
    fused = fusion(random_tokens(), output_attentions=True)
    assert fused.attentions.shape == (2, 4, 6)
    torch.testing.assert_close(fused.attentions.sum(-1), torch.ones(2, 4))
    torch.testing.assert_close(fused.layer_weights.sum(-1), torch.ones(2))
    torch.testing.assert_close(fused.pooled, fusion(random_tokens()).pooled)


def test_known_means_replace_the_patches():
    fusion, tokens = trained(AttentiveProbeFusion(3, 32)), random_tokens()
    cached = replace(tokens, patches=None, base_patches=None, patch_means=tokens.patches.mean(2))
    torch.testing.assert_close(fusion(cached).pooled, fusion(tokens).pooled)

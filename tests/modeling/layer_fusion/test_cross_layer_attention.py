import copy
from dataclasses import replace

import pytest
import torch
from fusion_tokens import random_tokens, trained
from peft import LoraConfig, inject_adapter_in_model

from vitweave.modeling.layer_fusion.cross_layer_attention import CrossLayerAttentionFusion

FORMS = [
    {},
    {"layers_as": "per_layer"},
    {"query": "learned", "num_queries": 3},
    {"query": "learned", "num_queries": 2, "layers_as": "per_layer"},
]


@pytest.mark.parametrize("with_mask", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_the_folded_evaluation_equals_the_plain_one(options, with_mask):
    fusion = trained(CrossLayerAttentionFusion(3, 32, num_heads=4, **options)).double()
    plain = copy.deepcopy(fusion)
    plain.folded = False
    mask = torch.rand(2, 15) > 0.3 if with_mask else None
    tokens = random_tokens(dtype=torch.float64, patch_mask=mask)
    for attentions in (False, True):
        a, b = fusion(tokens, output_attentions=attentions), plain(tokens, output_attentions=attentions)
        torch.testing.assert_close(a.pooled, b.pooled, rtol=1e-12, atol=1e-12)
        if "num_queries" in options:
            torch.testing.assert_close(a.extra_tokens, b.extra_tokens, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.attentions, b.attentions, rtol=1e-12, atol=1e-12)
    assert a.attentions.shape == (2, 4, 3, 15)
    torch.testing.assert_close(a.attentions.sum((2, 3)), torch.ones(2, 4, dtype=torch.float64))
    torch.testing.assert_close(a.layer_weights.sum(1), torch.ones(2, dtype=torch.float64))


def test_gradients_of_the_folded_evaluation_equal_those_of_the_plain_one():
    fusion = trained(CrossLayerAttentionFusion(3, 32, num_heads=4)).double()
    plain = copy.deepcopy(fusion)
    plain.folded = False
    for module in (fusion, plain):
        module(random_tokens(dtype=torch.float64)).pooled.square().sum().backward()
    for (name, a), b in zip(fusion.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_the_dense_form_treats_the_class_token_as_the_sparse_one_does():
    dense = trained(CrossLayerAttentionFusion(3, 32, num_heads=4, dense=True))
    sparse = CrossLayerAttentionFusion(3, 32, num_heads=4)
    sparse.load_state_dict(dense.state_dict())
    torch.testing.assert_close(sparse(random_tokens()).pooled, dense(random_tokens()).pooled)


def test_adapters_on_keys_and_values_reach_the_output():
    fusion = trained(CrossLayerAttentionFusion(3, 32, num_heads=4))
    tokens = random_tokens()
    before = fusion(tokens).pooled
    config = LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    adapted = inject_adapter_in_model(config, fusion)
    assert not torch.allclose(adapted(tokens).pooled, before, atol=1e-3)


def test_the_order_of_the_layers_counts():
    fusion = trained(CrossLayerAttentionFusion(3, 32, num_heads=4, norm="none"))
    tokens = random_tokens()
    turned = fusion(replace(tokens, patches=tokens.patches.flip(1))).pooled
    assert not torch.allclose(turned, fusion(tokens).pooled, atol=1e-3)
    torch.nn.init.zeros_(fusion.layer_embed)
    torch.testing.assert_close(fusion(replace(tokens, patches=tokens.patches.flip(1))).pooled, fusion(tokens).pooled)


def test_runs_under_autocast():
    fusion = trained(CrossLayerAttentionFusion(3, 32, num_heads=4))
    tokens = random_tokens(patch_mask=torch.rand(2, 15) > 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = fusion(tokens).pooled
    torch.testing.assert_close(pooled.float(), fusion(tokens).pooled, rtol=0.1, atol=0.1)


def test_several_queries_must_be_learnt_and_heads_must_fit():
    with pytest.raises(ValueError, match="1 query with query='cls'"):
        CrossLayerAttentionFusion(3, 32, num_queries=2)
    with pytest.raises(ValueError, match="num_heads to divide hidden_size=32, got 5"):
        CrossLayerAttentionFusion(3, 32, num_heads=5)

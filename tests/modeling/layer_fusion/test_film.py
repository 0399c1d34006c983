from dataclasses import replace

import torch
from fusion_tokens import random_tokens, trained

from vitweave.modeling.layer_fusion.film import FilmFusion, modulated_sum


def test_the_modulation_starts_as_the_identity():
    fusion = FilmFusion(3, 32, norm="none", direct=True)
    tokens = random_tokens()
    torch.testing.assert_close(fusion(tokens).patches, tokens.patches.mean(1))


def test_the_sum_is_that_of_the_modulated_layers():
    patches, delta, beta = torch.randn(2, 3, 15, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    weights = torch.tensor([0.5, 0.3, 0.2])
    modulated = (1 + delta[:, :, None]) * patches + beta[:, :, None]
    expected = (weights[:, None, None] * modulated).sum(1)
    torch.testing.assert_close(modulated_sum(patches, delta, beta, weights), expected)


def test_the_condition_is_the_output_of_the_encoder():
    fusion, tokens = trained(FilmFusion(3, 32, direct=True)), random_tokens()
    other = replace(tokens, base_cls=tokens.base_cls.flip(1))
    assert not torch.allclose(fusion(other).patches, fusion(tokens).patches, atol=1e-2)

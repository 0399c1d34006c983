import torch
import torch.nn.functional as F

from vitweave.analysis.similarity import layer_similarity, mean_pair_cosine, token_cosine


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_pair_cosine_equals_the_full_matrix():
    patches = tokens(3, 7, 5)
    matrix = F.cosine_similarity(patches[:, :, None], patches[:, None], dim=-1)  # (batch, patches, patches)
    matrix[:, torch.arange(7), torch.arange(7)] = 0
    torch.testing.assert_close(mean_pair_cosine(patches), matrix.sum(dim=(1, 2)) / (7 * 6), atol=1e-14, rtol=0)


def test_token_cosine_equals_torch():
    cls, patches = tokens(2, 5), tokens(2, 4, 5) + 1
    torch.testing.assert_close(token_cosine(cls, patches), F.cosine_similarity(cls[:, None], patches, dim=-1))


def test_scale_changes_nothing():
    cls, patches = tokens(2, 5), tokens(2, 4, 5) + 1
    scales = torch.rand(2, 4, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(token_cosine(3 * cls, patches * scales), token_cosine(cls, patches))
    torch.testing.assert_close(mean_pair_cosine(patches * scales), mean_pair_cosine(patches))


def test_equal_opposite_and_zero_patches():
    one = torch.ones(1, 1, 4)
    assert torch.allclose(mean_pair_cosine(one.expand(1, 6, 4)), torch.ones(1))
    assert torch.allclose(mean_pair_cosine(torch.cat((one, -one), dim=1)), -torch.ones(1))
    assert torch.allclose(mean_pair_cosine(torch.cat((one, one, 0 * one), dim=1)), torch.tensor([1 / 3]))


def test_layer_similarity_ignores_what_all_tokens_share():
    tokens = torch.randn(2, 1, 50, 8, generator=torch.Generator().manual_seed(0))
    offset = torch.full((8,), 100.0)
    similarity = layer_similarity(torch.cat([tokens, 3 * tokens + offset, -tokens], dim=1))
    expected = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    torch.testing.assert_close(similarity, expected, atol=1e-4, rtol=0)

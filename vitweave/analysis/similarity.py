"""Cosine similarities between class, register and patch tokens, without any tokens x tokens matrix."""

import torch
from torch import Tensor


def unit(tokens: Tensor) -> Tensor:
    """Scale the last axis to length 1; a zero vector stays zero."""
    norm = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    return tokens / norm.clamp_min(torch.finfo(tokens.dtype).tiny)


def token_cosine(cls: Tensor, tokens: Tensor) -> Tensor:
    """Cosine of one token with each of a set.

    Args:
        cls: (batch, hidden).
        tokens: (batch, tokens, hidden), patches or registers.

    Returns:
        (batch, tokens).
    """
    return torch.einsum("bh,bth->bt", unit(cls), unit(tokens))


def mean_pair_cosine(patches: Tensor) -> Tensor:
    """Mean cosine over all pairs of different patches: (|sum of unit vectors|^2 - N) / (N (N - 1)).

    A zero patch counts as a pair partner with cosine 0.

    Args:
        patches: (batch, patches, hidden) with at least two patches.

    Returns:
        (batch,).
    """
    count = patches.shape[1]
    if count < 2:
        raise ValueError(f"expected at least 2 patches to compare, got {count}; use a larger image")
    units = unit(patches)
    total = units.sum(dim=1).square().sum(dim=-1)  # all pairs, each patch with itself included
    return (total - units.square().sum(dim=(1, 2))) / (count * (count - 1))


def layer_similarity(tokens: Tensor) -> Tensor:
    """Mean cosine between the same token in two layers, without what all tokens of a layer have in common.

    Args:
        tokens: (batch, layers, tokens, hidden); of a single token the images are what is compared.

    Returns:
        (layers, layers).
    """
    states = tokens.float().transpose(0, 1).flatten(1, 2)  # (layers, batch * tokens, hidden)
    units = unit(states - states.mean(dim=1, keepdim=True))
    return torch.einsum("lth,mth->lm", units, units) / states.shape[1]

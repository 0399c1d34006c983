"""Softmax attention for the layer fusions that attend: to patches, to layers, to both."""

import torch.nn.functional as F
from torch import Tensor


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention; PyTorch's fused kernels unless the weights are asked for.

    Args:
        query: (batch, heads, queries, width). keys and values: (batch, heads, tokens, width).
        bias: added to the scores, broadcast to (batch, heads, queries, tokens).
        scale: of the scores; None for 1 / sqrt(width).

    Returns:
        (batch, heads, queries, width), and the weights (batch, heads, queries, tokens) if asked for.
    """
    if not output_attentions:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scale), None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ keys.transpose(-2, -1) * scale
    weights = (scores if bias is None else scores + bias).softmax(dim=-1)
    return weights @ values, weights


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """(batch, tokens, width) to (batch, heads, tokens, width / heads)."""
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(states: Tensor) -> Tensor:
    """(batch, heads, tokens, width / heads) to (batch, tokens, width)."""
    return states.transpose(1, 2).flatten(2)


def check_heads(hidden_size: int, num_heads: int | None) -> int:
    """The number of heads, which must divide the hidden size; None stands for one per 64 channels."""
    if num_heads is None:
        num_heads = hidden_size // 64 if hidden_size % 64 == 0 else 1
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(f"expected num_heads to divide hidden_size={hidden_size}, got {num_heads}")
    return num_heads

"""Attention on the meta device as fused kernels do it: what they keep for the backward pass, no matrix of scores."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class FusedAttention(TorchFunctionMode):
    """Scaled dot product attention by the memory-efficient kernel's own shapes.

    On the meta device torch would write it out and keep every score, which no GPU does; the FLOPs are the same.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return fused(*args, **(kwargs or {}))


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """(batch, heads, tokens, hidden) of queries, and of keys and values, of which each may serve several queries."""
    if query.dim() != 4:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if enable_gqa and key.shape[1] != query.shape[1]:
        shape = (-1, query.shape[1] // key.shape[1], -1, -1)
        key, value = (part.unsqueeze(2).expand(-1, *shape).flatten(1, 2) for part in (key, value))
    if attn_mask is not None:
        shape = (*query.shape[:3], key.shape[2])
        attn_mask = attn_mask.to(query.dtype).expand(shape)  # a mask of bool becomes one of numbers, as in torch
    wants_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, wants_gradient, dropout_p, is_causal, scale=scale
    )[0]

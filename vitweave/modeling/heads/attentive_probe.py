"""A classifier that attends over the tokens of a frozen encoder."""

import torch
from torch import Tensor, nn

from vitweave.modeling.linear_weights import weight_of


class AttentiveProbe(nn.Module):
    """One learned query attends over tokens; batch norm and a linear classifier read the result (arXiv:2202.03026).

    The tokens are those of one layer, or class token and mean patch of several. Query, keys and values have a LayerNorm
    each, the projections of q, k and v no bias, and the heads are twice as wide as usual, as in the released code of
    attentive layer fusion. Because the query is the same for all images, the key projection is folded into it and the
    value projection follows the weighting: the same numbers without projecting every token.

    Args:
        head_size: width of one head; None = 2 * (hidden_size // num_heads).
    """

    def __init__(self, hidden_size: int, num_labels: int, num_heads: int = 8, head_size: int | None = None):
        super().__init__()
        if num_heads < 1 or (head_size is None and num_heads > hidden_size):
            raise ValueError(f"expected 1 to hidden_size={hidden_size} heads, got {num_heads}")
        self.num_heads, self.head_size = num_heads, head_size or 2 * (hidden_size // num_heads)
        width = self.num_heads * self.head_size
        self.query = nn.Parameter(torch.empty(hidden_size).normal_(std=0.02))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(hidden_size, eps=1e-5) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden_size, width, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(width, hidden_size)
        self.norm = nn.BatchNorm1d(hidden_size)
        self.classifier = nn.Linear(hidden_size, num_labels)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def attend(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, tokens, hidden) -> pooled (batch, hidden) and attention weights (batch, heads, tokens)."""
        per_head = (self.num_heads, self.head_size, -1)
        query = self.q_proj(self.norm_q(self.query)).view(self.num_heads, self.head_size)
        query = torch.einsum("nd,ndh->nh", query, weight_of(self.k_proj).view(per_head))  # (heads, hidden)
        scores = self.norm_k(tokens) @ query.T * self.head_size**-0.5  # (batch, tokens, heads)
        weights = scores.softmax(dim=1).transpose(1, 2)  # (batch, heads, tokens)
        mixed = weights @ self.norm_v(tokens)  # (batch, heads, hidden)
        values = torch.einsum("bnh,ndh->bnd", mixed, weight_of(self.v_proj).view(per_head))
        return self.out_proj(values.flatten(1)), weights

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (batch, tokens, hidden) to logits (batch, num_labels)."""
        pooled, _ = self.attend(tokens)
        return self.classifier(self.norm(pooled))

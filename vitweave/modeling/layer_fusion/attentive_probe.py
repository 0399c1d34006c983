"""One learnt query over the [CLS] token and the mean patch of every layer."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.layer_fusion.base import FusedTokens, LayerFusion, LayerTokens, check_choice
from vitweave.modeling.layer_fusion.base_attention import attend, check_heads, join_heads, split_heads


class AttentiveProbeFusion(LayerFusion):
    """Attentive layer fusion (arXiv:2601.09322): attention over `[c_1, mean p_1, c_2, mean p_2, ...]`, 2L tokens.

    Heads are twice as wide as usual (2 * hidden / heads), query, keys and values have a LayerNorm each and no bias.
    The published probe has one head per token and puts BatchNorm and a linear classifier behind. Of every image only 2L
    vectors are read, so it trains on cached features; over many layers it is the safe choice.
    `attentions` is (batch, heads, 2 * layers).

    Args:
        num_heads: None for the largest divisor of the hidden size that is not above 2L.
        query: "learned", or "cls" for the encoder's own [CLS] token.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        num_heads: int | None = None,
        query: str = "learned",
        norm: str = "none",
        direct: bool = False,
    ):
        super().__init__(num_layers, hidden_size, needs=("cls", "patch_means"), norm=norm, direct=direct)
        check_choice("query", query, ("learned", "cls"))
        if num_heads is None:
            num_heads = max(n for n in range(1, 2 * num_layers + 1) if hidden_size % n == 0)
        self.num_heads, width = check_heads(hidden_size, num_heads), 2 * hidden_size
        if query == "learned":
            self.query = nn.Parameter(torch.empty(hidden_size))
        self.norm_q = nn.LayerNorm(hidden_size, eps=1e-5)
        self.norm_k = nn.LayerNorm(hidden_size, eps=1e-5)
        self.norm_v = nn.LayerNorm(hidden_size, eps=1e-5)
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.v_proj = nn.Linear(hidden_size, width, bias=False)
        self.out_proj = nn.Linear(width, hidden_size)
        self.set_start_values()

    def set_start_values(self) -> None:
        super().set_start_values()
        if hasattr(self, "query"):
            init.normal_(self.query, std=0.02)

    def forward(self, tokens: LayerTokens, output_attentions: bool = False) -> FusedTokens:
        states = torch.stack([self.normed_cls(tokens), self.normed_means(tokens)], dim=2).flatten(1, 2)
        query = self.query.expand_as(tokens.base_cls) if hasattr(self, "query") else tokens.base_cls
        query = self.q_proj(self.norm_q(query))[:, None]  # (batch, 1, 2 * hidden)
        keys, values = self.k_proj(self.norm_k(states)), self.v_proj(self.norm_v(states))
        parts = (split_heads(part, self.num_heads) for part in (query, keys, values))
        context, weights = attend(*parts, output_attentions=output_attentions)
        fused = self.out_proj(join_heads(context)[:, 0])
        weights = None if weights is None else weights[:, :, 0]  # (batch, heads, 2 * layers)
        return FusedTokens(
            pooled=self.residual("global", tokens.base_cls, fused),
            layer_weights=layer_mass(weights),
            attentions=weights,
        )


def layer_mass(weights: Tensor | None) -> Tensor | None:
    """(batch, layers), the attention that the two tokens of each layer got, averaged over the heads."""
    return None if weights is None else weights.mean(dim=1).unflatten(1, (-1, 2)).sum(dim=2)

"""A semantic query picks detail from the patches of all layers."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.layer_fusion.base import FeedForward, FusedTokens, LayerFusion, LayerTokens, check_choice
from vitweave.modeling.layer_fusion.base_attention import attend, check_heads, join_heads, split_heads
from vitweave.modeling.linear_weights import weight_of


class CrossLayerAttentionFusion(LayerFusion):
    """Attention of the [CLS] token, or learnt queries, to the patches of all layers, and a feed-forward part.

    `x = base + gamma_attn * W_o attention(W_q LN(query), W_k (p + e_l), W_v p)`, `x + gamma_ffn * FFN(LN(x))`; layer
    embeddings e are on the keys only. The design of CrossViT (arXiv:2103.14899), of CoCa's attentional pooler
    (arXiv:2205.01917) and of SigLIP's attention pooling; the direct form is `x = W_o attention(...)`, `x + FFN(LN(x))`.
    The keys have no bias: it would cancel in the softmax.

    Evaluation: for few queries, W_k is folded into the query and W_v applied behind the average, which is the same
    function at 2 L N C H instead of 2 L N C^2 multiplications. Folding reads the weights of `k_proj` and `v_proj`, so
    projections that something has wrapped (LoRA before merging, quantisation) are evaluated as they are written.

    `attentions` is (batch, heads, layers, patches), of the first query; `layer_weights` its sum over the patches,
    averaged over the heads.

    Args:
        query: "cls" for the encoder's own [CLS] token, or "learned".
        num_queries: how many learnt queries; the first gives `pooled`, the others `extra_tokens`.
        layers_as: "joint" for one softmax over all layers, or "per_layer" for one softmax in each and a weighted sum
            with `softmax(layer_logits)`; layer embeddings would cancel there and do not exist.
        dense: the encoder's patches are queries, too (MMFuser, arXiv:2410.11829); costs layers * patches^2, not folded.
        mlp_ratio: width of the feed-forward part; 0 leaves it out.
        folded: False always evaluates the projections as they are written.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        num_heads: int | None = None,
        query: str = "cls",
        num_queries: int = 1,
        layers_as: str = "joint",
        dense: bool = False,
        mlp_ratio: float = 4.0,
        folded: bool = True,
        norm: str = "per_layer",
        direct: bool = False,
    ):
        residuals = ("attn", "ffn") if mlp_ratio else ("attn",)
        super().__init__(num_layers, hidden_size, needs=("patches",), residuals=residuals, norm=norm, direct=direct)
        check_choice("query", query, ("cls", "learned"))
        check_choice("layers_as", layers_as, ("joint", "per_layer"))
        if num_queries < 1 or (query == "cls" and num_queries > 1):
            raise ValueError(f"expected 1 query with query='cls' and 1 or more with 'learned', got {num_queries}")
        self.num_heads = check_heads(hidden_size, num_heads)
        self.num_queries, self.joint, self.dense, self.folded = num_queries, layers_as == "joint", dense, folded
        self.map_channels = (hidden_size,) if dense else ()
        if query == "learned":
            self.query = nn.Parameter(torch.empty(num_queries, hidden_size))
        if self.joint:
            self.layer_embed = nn.Parameter(torch.empty(num_layers, hidden_size))
        else:
            self.layer_logits = nn.Parameter(torch.empty(num_layers))
        self.q_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        if mlp_ratio:
            self.ffn_norm = nn.LayerNorm(hidden_size, eps=1e-6)
            self.ffn = FeedForward(hidden_size, int(hidden_size * mlp_ratio), hidden_size)
        self.set_start_values()

    def set_start_values(self) -> None:
        super().set_start_values()
        if self.joint:
            init.normal_(self.layer_embed, std=0.02)
        else:
            init.zeros_(self.layer_logits)
        if hasattr(self, "query"):
            init.normal_(self.query, std=0.02)

    def forward(self, tokens: LayerTokens, output_attentions: bool = False) -> FusedTokens:
        base = tokens.base_cls[:, None].expand(-1, self.num_queries, -1)
        query = self.query.expand_as(base) if hasattr(self, "query") else base
        if self.dense:
            base = torch.cat([base, tokens.base_patches], dim=1)
            query = torch.cat([query, tokens.base_patches], dim=1)
        states = self.normed_patches(tokens)
        query = self.q_proj(self.q_norm(query))  # (batch, queries, hidden)
        fold = self.folded and not self.dense and type(self.k_proj) is type(self.v_proj) is nn.Linear
        evaluate = self.folded_attention if fold else self.plain_attention
        context, weights = evaluate(query, states, self.bias_of_mask(tokens.patch_mask, states), output_attentions)
        fused = self.residual("attn", base, self.out_proj(context))
        if hasattr(self, "ffn"):
            update = self.ffn(self.ffn_norm(fused))
            fused = fused + (update if self.direct else self.gamma_ffn * update)
        return FusedTokens(
            pooled=fused[:, 0],
            patches=fused[:, self.num_queries :] if self.dense else None,
            layer_weights=None if weights is None else weights.sum(dim=3).mean(dim=1),
            attentions=weights,
            extra_tokens=fused[:, 1 : self.num_queries] if self.num_queries > 1 else None,
        )

    def bias_of_mask(self, mask: Tensor | None, states: Tensor) -> Tensor | None:
        """(batch, 1, 1, 1, patches), minus infinity at the masked patches."""
        if mask is None:
            return None
        bias = torch.zeros_like(mask, dtype=states.dtype).masked_fill(~mask, float("-inf"))
        return bias[:, None, None, None]

    def folded_attention(
        self, query: Tensor, states: Tensor, mask_bias: Tensor | None, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The heads as queries to the patches themselves, (batch, queries * heads, hidden)."""
        heads, scale = self.num_heads, (self.hidden_size // self.num_heads) ** -0.5
        to_keys = weight_of(self.k_proj).unflatten(0, (heads, -1))  # (heads, width, hidden)
        folded = torch.einsum("bqhd,hdc->bqhc", query.unflatten(2, (heads, -1)), to_keys).flatten(1, 2)
        bias = mask_bias
        if self.joint:
            on_layers = scale * torch.einsum("brc,lc->brl", folded, self.layer_embed)[:, None, :, :, None]
            bias = on_layers if bias is None else on_layers + bias  # (batch, 1, rows, layers, patches or 1)
        context, weights = self.over_layers(folded[:, None], states, states, bias, scale, output_attentions)
        context = context[:, 0].unflatten(1, (-1, heads))  # (batch, queries, heads, hidden)
        to_values = weight_of(self.v_proj).unflatten(0, (heads, -1))
        context = torch.einsum("bqhc,hdc->bqhd", context, to_values).flatten(2) + self.v_proj.bias
        return context, None if weights is None else weights[:, 0, :heads]

    def plain_attention(
        self, query: Tensor, states: Tensor, mask_bias: Tensor | None, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Keys and values of every patch of every layer."""
        keys = self.k_proj(states + self.layer_embed[:, None] if self.joint else states)
        query, scale = split_heads(query, self.num_heads), (self.hidden_size // self.num_heads) ** -0.5
        context, weights = self.over_layers(query, keys, self.v_proj(states), mask_bias, scale, output_attentions)
        return join_heads(context), None if weights is None else weights[:, :, 0]

    def over_layers(
        self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One softmax over the patches of all layers, or one in each layer and their weighted sum.

        Args:
            query: (batch, heads, rows, width).
            keys and values: (batch, layers, patches, heads * width).
            bias: added to the scores, broadcast to (batch, heads, rows, layers, patches).

        Returns:
            (batch, heads, rows, width), and if asked for the weights (batch, heads, rows, layers, patches).
        """
        heads, num_layers, patches = query.shape[1], keys.shape[1], keys.shape[2]
        if self.joint:
            keys, values = (split_heads(part.flatten(1, 2), heads) for part in (keys, values))
            bias = None if bias is None else bias.expand(*bias.shape[:3], num_layers, patches).flatten(3)
            context, weights = attend(query, keys, values, bias, scale, output_attentions)
            return context, None if weights is None else weights.unflatten(3, (num_layers, patches))
        keys, values = (split_heads(part.flatten(0, 1), heads) for part in (keys, values))
        query = query.repeat_interleave(num_layers, dim=0)  # (batch * layers, heads, rows, width)
        bias = None if bias is None else bias[:, :, :, 0].repeat_interleave(num_layers, dim=0)
        context, weights = attend(query, keys, values, bias, scale, output_attentions)
        by_layer = self.layer_logits.softmax(dim=0)
        context = torch.einsum("l,blhrd->bhrd", by_layer, context.unflatten(0, (-1, num_layers)))
        if weights is None:
            return context, None
        return context, torch.einsum("l,blhrn->bhrln", by_layer, weights.unflatten(0, (-1, num_layers)))

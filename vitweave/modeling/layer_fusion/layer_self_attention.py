"""A small transformer over the [CLS] tokens of the layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.layer_fusion.base import FusedTokens, LayerFusion, LayerTokens, check_choice
from vitweave.modeling.layer_fusion.base_attention import attend, check_heads, join_heads, split_heads


class LayerSelfAttentionFusion(LayerFusion):
    """Encoder blocks over `[fuse token, c_1 + e_1, ..., c_L + e_L]`, then a norm and a read-out.

    No paper defines it; the blocks are those of ViT (arXiv:2010.11929). Large for what it sees: keep `depth` at 1 or 2.
    `attentions` is (batch, blocks, heads, tokens, tokens), the fuse token first where there is one.

    Args:
        readout: "fuse" reads a learnt token put in front (which has no layer embedding), "last" the deepest layer,
            "mean" all layers.
        reads: "cls", or "cls+mean" for the mean patches of the layers as tokens, too (with the same embeddings).
        norm_first: False puts the block norms behind the sums, as in the original transformer (arXiv:1706.03762).
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        depth: int = 1,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        readout: str = "fuse",
        reads: str = "cls",
        norm_first: bool = True,
        norm: str = "per_layer",
        direct: bool = False,
    ):
        check_choice("readout", readout, ("fuse", "last", "mean"))
        check_choice("reads", reads, ("cls", "cls+mean"))
        needs = ("cls",) if reads == "cls" else ("cls", "patch_means")
        super().__init__(num_layers, hidden_size, needs=needs, norm=norm, direct=direct)
        self.readout = readout
        num_heads, mlp_size = check_heads(hidden_size, num_heads), int(hidden_size * mlp_ratio)
        self.layer_embed = nn.Parameter(torch.empty(num_layers, hidden_size))
        if readout == "fuse":
            self.fuse_token = nn.Parameter(torch.empty(hidden_size))
        self.blocks = nn.ModuleList(EncoderBlock(hidden_size, num_heads, mlp_size, norm_first) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.set_start_values()

    def set_start_values(self) -> None:
        super().set_start_values()
        init.normal_(self.layer_embed, std=0.02)
        if self.readout == "fuse":
            init.normal_(self.fuse_token, std=0.02)

    def sequence(self, tokens: LayerTokens) -> Tensor:
        """(batch, [1 +] layers or 2 * layers, hidden): the fuse token, the [CLS] tokens, the means; each by layer."""
        states = self.normed_cls(tokens) + self.layer_embed
        parts = [self.fuse_token.expand(states.shape[0], 1, -1)] if self.readout == "fuse" else []
        parts.append(states)
        if "patch_means" in self.needs:
            parts.append(self.normed_means(tokens) + self.layer_embed)
        return torch.cat(parts, dim=1)

    def read(self, states: Tensor) -> Tensor:
        """(batch, hidden) of what the blocks returned."""
        if self.readout == "fuse":
            return states[:, 0]
        return states[:, self.num_layers - 1] if self.readout == "last" else states.mean(dim=1)

    def forward(self, tokens: LayerTokens, output_attentions: bool = False) -> FusedTokens:
        states, attentions = self.sequence(tokens), []
        for block in self.blocks:
            states, weights = block(states, output_attentions)
            attentions.append(weights)
        fused = self.read(self.norm(states))
        return FusedTokens(
            pooled=self.residual("global", tokens.base_cls, fused),
            attentions=torch.stack(attentions, dim=1) if output_attentions else None,
        )


class EncoderBlock(nn.Module):
    """Self-attention and a two-layer perceptron with gelu, each with a norm in front of it, or behind the sum."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, norm_first: bool = True, eps: float = 1e-6):
        super().__init__()
        self.num_heads, self.norm_first = num_heads, norm_first
        self.norm1 = nn.LayerNorm(hidden_size, eps=eps)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size, eps=eps)
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def attention(self, states: Tensor, output_attentions: bool) -> tuple[Tensor, Tensor | None]:
        query, keys, values = (split_heads(part, self.num_heads) for part in self.qkv(states).chunk(3, dim=-1))
        context, weights = attend(query, keys, values, output_attentions=output_attentions)
        return self.out_proj(join_heads(context)), weights

    def mlp(self, states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(states)))

    def forward(self, states: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        """States (batch, tokens, hidden) and, if asked for, the attention (batch, heads, tokens, tokens)."""
        if self.norm_first:
            update, weights = self.attention(self.norm1(states), output_attentions)
            states = states + update
            return states + self.mlp(self.norm2(states)), weights
        update, weights = self.attention(states, output_attentions)
        states = self.norm1(states + update)
        return self.norm2(states + self.mlp(states)), weights

"""The blocks of the specialised ViT: attention, MLP, residual block, and CaiT's class attention for comparison."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.tokens import DropPath, LayerScale, add_linear, by_role
from vitweave.modeling.vit_embeddings import RelativePositionBias, rotate


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention in plain tensor operations; returns (batch, tokens, heads, head size) and the weights."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = (
            weights.masked_fill(~attention_mask, float("-inf"))
            if attention_mask.dtype == torch.bool
            else (weights + attention_mask)
        )
    weights = F.dropout(weights.softmax(dim=-1), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SpecializedViTAttention(nn.Module):
    """Joint self-attention over all tokens; q, k, v and the output projection may own [CLS] twins.

    With `attention_bias="kv"` every query also sees one learnt key and value per head (the form of arXiv:2402.17762).
    They are never specialised and never rotated, and stay visible under any mask; the attention weights then have one
    extra column, the last.
    """

    def __init__(self, config: SpecializedViTConfig, index: int):
        super().__init__()
        self.config = config
        self.run_config = config  # whose attention implementation counts
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.num_cls_rows = config.num_cls_rows
        self.cls_scale = low_rank_scale(config)

        width, rank = config.hidden_size, config.cls_rank
        biases = {"q": config.query_bias, "k": config.key_bias, "v": config.value_bias}
        for part, bias in biases.items():
            specialized = index in config.qkv_blocks and part in config.qkv_parts
            down = "qkv_cls_down" if config.cls_rank_fused else None
            add_linear(self, f"{part}_proj", width, width, bias, specialized, rank, down)
        add_linear(self, "o_proj", width, width, config.proj_bias, index in config.proj_blocks, rank)
        if config.attention_bias:
            self.bias_k = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))
            self.bias_v = nn.Parameter(torch.zeros(self.num_heads, self.head_dim))

    def project(self, name: str, hidden_states: Tensor) -> Tensor:
        """(batch, tokens, hidden) -> (batch, heads, tokens, head size), of this process's heads if they are split."""
        projected = by_role(self, name, self.num_cls_rows, hidden_states)
        return projected.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        between: Callable[[Tensor], Tensor] | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            between: changes what the heads return (batch, tokens, hidden) before the output projection.
        """
        query, key, value = (self.project(name, hidden_states) for name in ("q_proj", "k_proj", "v_proj"))
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if self.config.attention_bias:
            extra = (key.shape[0], self.num_heads, 1, self.head_dim)
            key = torch.cat((key, self.bias_k.to(key.dtype)[None, :, None].expand(extra)), dim=2)
            value = torch.cat((value, self.bias_v.to(value.dtype)[None, :, None].expand(extra)), dim=2)
            if attention_mask is not None:  # the extra key is visible to all: True in a mask, 0 in a bias
                attention_mask = F.pad(attention_mask, (0, 1), value=attention_mask.dtype == torch.bool)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.run_config._attn_implementation, eager_attention)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        context, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        mixed = context.flatten(2) if between is None else between(context.flatten(2))
        return by_role(self, "o_proj", self.num_cls_rows, mixed), weights


class SpecializedViTMLP(nn.Module):
    """Two linears with an activation, or SwiGLU's three (arXiv:2002.05202); each may own a [CLS] twin."""

    def __init__(self, config: SpecializedViTConfig, index: int):
        super().__init__()
        self.gated = config.use_swiglu_ffn
        self.activation = ACT2FN[config.hidden_act or ("silu" if self.gated else "gelu")]
        self.num_cls_rows = config.num_cls_rows
        self.cls_scale = low_rank_scale(config)
        narrow, wide = config.hidden_size, config.mlp_width
        shapes = {"fc1": (narrow, wide), "fc2": (wide, narrow)}
        if self.gated:
            shapes = {"gate_proj": (narrow, wide), "up_proj": (narrow, wide), "down_proj": (wide, narrow)}
        for name, (fan_in, fan_out) in shapes.items():
            add_linear(self, name, fan_in, fan_out, config.mlp_bias, index in config.mlp_blocks, config.cls_rank)

    def forward(self, hidden_states: Tensor) -> Tensor:
        n = self.num_cls_rows
        if self.gated:
            gate = self.activation(by_role(self, "gate_proj", n, hidden_states))
            return by_role(self, "down_proj", n, gate * by_role(self, "up_proj", n, hidden_states))
        return by_role(self, "fc2", n, self.activation(by_role(self, "fc1", n, hidden_states)))


def low_rank_scale(config: SpecializedViTConfig) -> float:
    """alpha / rank of the built-in low-rank [CLS] update; alpha defaults to the rank."""
    if not config.cls_rank:
        return 1.0
    return (config.cls_rank if config.cls_alpha is None else config.cls_alpha) / config.cls_rank


class SpecializedViTLayer(GradientCheckpointingLayer):
    """A pre-norm block whose norms, LayerScales and linears may own [CLS] twins."""

    def __init__(self, config: SpecializedViTConfig, index: int):
        super().__init__()
        self.num_cls_rows = config.num_cls_rows
        self.num_skipped = config.num_cls_tokens if config.class_attention_layers else 0
        norm_twins = config.specialize_norm and index in config.norm_blocks
        scale_twins = norm_twins and config.specialize_layer_scale
        names = [("norm1", norm_twins), ("norm2", norm_twins)]
        for name, twin in names:
            for suffix in ("", "_cls") if twin else ("",):
                setattr(self, name + suffix, nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps))
        self.has_layer_scale = config.layerscale_value is not None
        if self.has_layer_scale:
            for name in ("layer_scale1", "layer_scale2"):
                for suffix in ("", "_cls") if scale_twins else ("",):
                    setattr(self, name + suffix, LayerScale(config.hidden_size, config.layerscale_value))
        self.attention = SpecializedViTAttention(config, index)
        self.mlp = SpecializedViTMLP(config, index)
        self.relative_position_bias = (
            RelativePositionBias(config) if config.relative_position_bias == "per_layer" else None
        )
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path_rate(config, index))

    def add_branch(self, layer_scale: str, branch: Tensor, residual: Tensor) -> Tensor:
        """residual + LayerScale(branch); DropPath commutes with LayerScale and goes first."""
        branch = self.drop_path(self.dropout(branch))
        if not self.has_layer_scale:
            return residual + branch
        return by_role(self, layer_scale, self.num_cls_rows, branch, residual)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        grid: tuple[int, int] | None = None,
        **kwargs,
    ) -> Tensor:
        skipped, hidden_states = hidden_states[:, : self.num_skipped], hidden_states[:, self.num_skipped :]
        if self.relative_position_bias is not None:
            attention_mask = add_bias(attention_mask, self.relative_position_bias(grid).to(hidden_states.dtype))
        normed = by_role(self, "norm1", self.num_cls_rows, hidden_states)
        attended, _ = self.attention(normed, attention_mask, rotary, **kwargs)
        hidden_states = self.add_branch("layer_scale1", attended, hidden_states)
        normed = by_role(self, "norm2", self.num_cls_rows, hidden_states)
        hidden_states = self.add_branch("layer_scale2", self.mlp(normed), hidden_states)
        return torch.cat((skipped, hidden_states), dim=1) if self.num_skipped else hidden_states


def drop_path_rate(config: SpecializedViTConfig, index: int) -> float:
    """The block's rate: the same everywhere, or rising linearly from 0 in the first block."""
    if config.drop_path_decay == "uniform":
        return config.drop_path_rate
    return config.drop_path_rate * index / max(config.num_hidden_layers - 1, 1)


def add_bias(attention_mask: Tensor | None, bias: Tensor) -> Tensor:
    """An additive attention bias together with a mask (boolean, True = visible, or additive)."""
    if attention_mask is None:
        return bias
    if attention_mask.dtype == torch.bool:
        return bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
    return bias + attention_mask


class ClassAttention(nn.Module):
    """Attention in which only the class tokens ask (CaiT, arXiv:2103.17239, without talking heads)."""

    def __init__(self, config: SpecializedViTConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        width = config.hidden_size
        self.q_proj = nn.Linear(width, width, bias=config.query_bias)
        self.k_proj = nn.Linear(width, width, bias=config.key_bias)
        self.v_proj = nn.Linear(width, width, bias=config.value_bias)
        self.o_proj = nn.Linear(width, width, bias=config.proj_bias)

    def forward(self, tokens: Tensor, num_cls: int, attention_mask: Tensor | None, **kwargs) -> tuple[Tensor, Tensor]:
        """(batch, tokens, hidden) -> (batch, num_cls, hidden)."""
        heads = (-1, self.head_dim)  # of this process, if distributed
        query = self.q_proj(tokens[:, :num_cls]).unflatten(2, heads).transpose(1, 2)
        key = self.k_proj(tokens).unflatten(2, heads).transpose(1, 2)
        value = self.v_proj(tokens).unflatten(2, heads).transpose(1, 2)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        mask = None if attention_mask is None else attention_mask[..., :num_cls, :]
        context, weights = attend(self, query, key, value, mask, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.o_proj(context.flatten(2)), weights


class ClassAttentionLayer(GradientCheckpointingLayer):
    """CaiT's second stage: the class tokens read all tokens, the patches stay as they are (arXiv:2103.17239)."""

    def __init__(self, config: SpecializedViTConfig):
        super().__init__()
        self.num_cls = config.num_cls_tokens
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ClassAttention(config)
        self.layer_scale1 = LayerScale(config.hidden_size, config.class_attention_scale)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SpecializedViTMLP(config, index=-1)
        self.layer_scale2 = LayerScale(config.hidden_size, config.class_attention_scale)
        self.drop_path = DropPath(config.drop_path_rate)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        cls, rest = hidden_states[:, : self.num_cls], hidden_states[:, self.num_cls :]
        attended, _ = self.attention(self.norm1(hidden_states), self.num_cls, attention_mask, **kwargs)
        cls = self.layer_scale1(self.drop_path(attended), cls)
        cls = self.layer_scale2(self.drop_path(self.mlp(self.norm2(cls))), cls)
        return torch.cat((cls, rest), dim=1)

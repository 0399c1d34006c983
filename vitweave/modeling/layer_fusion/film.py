"""The deepest features modulate the shallow ones, channel by channel."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.layer_fusion.base import (
    FeedForward,
    FusedTokens,
    LayerFusion,
    LayerTokens,
    ZeroLinear,
    mean_of_valid,
)


class FilmFusion(LayerFusion):
    """Feature-wise linear modulation (FiLM, arXiv:1709.07871) of the patches of every layer by the encoder's output.

    `[delta_l, beta_l] = fc2(gelu(fc1(LN(base_cls))))`, `mix = sum_l a_l ((1 + delta_l) * p_l + beta_l)` with
    `a = softmax(layer_logits)`; the embedding adds `W mean(mix) + b`, the patches add `mix`. `fc2` starts at zero, so
    the modulation starts as the identity; predicting the difference to one is the official code's rule, too. delta is
    not bounded, and beta reaches the embedding without looking at the patches.

    Args:
        film_hidden_size: width between `fc1` and `fc2`; None for a quarter of the hidden size.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        film_hidden_size: int | None = None,
        norm: str = "per_layer",
        direct: bool = False,
    ):
        residuals = ("global", "patch")
        super().__init__(num_layers, hidden_size, needs=("patches",), residuals=residuals, norm=norm, direct=direct)
        film_size = film_hidden_size or max(1, hidden_size // 4)
        self.cond_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.film = FeedForward(hidden_size, film_size, num_layers * 2 * hidden_size, last=ZeroLinear)
        self.layer_logits = nn.Parameter(torch.empty(num_layers))
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.set_start_values()

    def set_start_values(self) -> None:
        super().set_start_values()
        init.zeros_(self.layer_logits)

    def modulation(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Scale minus one and shift, (batch, layers, hidden) each, from the condition (batch, hidden)."""
        both = self.film(self.cond_norm(condition)).unflatten(1, (self.num_layers, 2, -1))
        return both[:, :, 0], both[:, :, 1]

    def forward(self, tokens: LayerTokens, output_attentions: bool = False) -> FusedTokens:
        weights = self.layer_logits.softmax(dim=0)  # (layers,)
        mix = modulated_sum(self.normed_patches(tokens), *self.modulation(tokens.base_cls), weights)
        fused = self.proj(mean_of_valid(mix, tokens.patch_mask))
        return FusedTokens(
            pooled=self.residual("global", tokens.base_cls, fused),
            patches=self.residual("patch", tokens.base_patches, mix),
            layer_weights=weights,
        )


def modulated_sum(patches: Tensor, delta: Tensor, beta: Tensor, weights: Tensor) -> Tensor:
    """`sum_l weights_l ((1 + delta_l) * patches_l + beta_l)`, without keeping the modulated layers.

    Args:
        patches: (batch, layers, patches, hidden).
        delta, beta: (batch, layers, hidden).
        weights: (layers,).

    Returns:
        (batch, patches, hidden).
    """
    scale = weights[:, None] * (1 + delta)
    shift = torch.einsum("l,blc->bc", weights, beta)
    return torch.einsum("blc,blnc->bnc", scale, patches) + shift[:, None]

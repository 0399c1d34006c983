"""Weights for the layers that every image chooses for itself."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.layer_fusion.base import FeedForward, FusedTokens, LayerFusion, LayerTokens, check_choice

CLOSED = -4.0  # sigmoid(-4) = 0.018


class GatedSumFusion(LayerFusion):
    """`sum_l a_l * c_l` with gates read from all layers: `a = softmax_l(fc2(gelu(fc1([c_1; ...; c_L]))))`.

    A gated mixture of the [CLS] tokens (mixture-of-experts gating over layers; no single paper defines it). With
    `gate="sigmoid"` the gates do not compete, and their sum may grow with the number of layers. `fc2` starts at zero:
    softmax gates start equal, sigmoid gates nearly closed but for the deepest layer. Gates tend to collapse onto one
    layer; `layer_weights` (batch, layers), of channel gates the mean over channels, shows it.

    Args:
        granularity: one gate per "layer", or per layer and "channel".
        gate_hidden_size: width between `fc1` and `fc2`; None for a quarter of the hidden size.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        granularity: str = "layer",
        gate: str = "softmax",
        gate_hidden_size: int | None = None,
        norm: str = "per_layer",
        direct: bool = False,
    ):
        super().__init__(num_layers, hidden_size, norm=norm, direct=direct)
        check_choice("granularity", granularity, ("layer", "channel"))
        check_choice("gate", gate, ("softmax", "sigmoid"))
        self.kind = gate
        gate_size = gate_hidden_size or max(1, hidden_size // 4)
        self.gate = FeedForward(num_layers * hidden_size, gate_size, num_layers)
        channels = hidden_size if granularity == "channel" else 1
        self.gate.fc2 = GateLinear(gate_size, num_layers, channels, closed=gate == "sigmoid")

    def gates(self, cls: Tensor) -> Tensor:
        """(batch, layers, 1 or hidden) from the normalised [CLS] tokens (batch, layers, hidden)."""
        scores = self.gate(cls.flatten(1)).unflatten(1, (self.num_layers, -1))
        return scores.softmax(dim=1) if self.kind == "softmax" else scores.sigmoid()

    def forward(self, tokens: LayerTokens, output_attentions: bool = False) -> FusedTokens:
        cls = self.normed_cls(tokens)
        gates = self.gates(cls)
        pooled = self.residual("global", tokens.base_cls, (gates * cls).sum(dim=1))
        return FusedTokens(pooled=pooled, layer_weights=gates.mean(dim=2))


class GateLinear(nn.Linear):
    """Scores of the gates, starting at zero, or closed for all layers but the deepest."""

    def __init__(self, in_features: int, num_layers: int, channels: int, closed: bool):
        super().__init__(in_features, num_layers * channels)
        self.num_open = channels if closed else num_layers * channels
        self.set_start_values()

    def set_start_values(self) -> None:
        """Weight zero; bias zero where open, `CLOSED` elsewhere."""
        init.zeros_(self.weight)
        position = torch.arange(self.out_features, device=self.bias.device)
        init.copy_(self.bias, CLOSED * (position < self.out_features - self.num_open))

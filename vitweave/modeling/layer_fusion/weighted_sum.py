"""Learnt weights for the layers, the same for every image."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.layer_fusion.base import FusedTokens, LayerFusion, LayerTokens, check_choice

NORMALISATIONS = ("softmax", "fast", "sum")
LAST_LOGIT = 10.0  # start="last": the other layers together then weigh about (layers - 1) * exp(-10)
FAST_EPS = 1e-4  # of BiFPN's fast normalised fusion


class WeightedSumFusion(LayerFusion):
    """Weighted sum of the layers, `scale * sum_l a_l x_l`, with the same weights for [CLS] and patches.

    "softmax" (the layer mixing of ELMo, arXiv:1802.05365): `a = softmax(layer_logits / temperature)`.
    "fast" (BiFPN, arXiv:1911.09070): `a = relu(w) / (sum relu(w) + 1e-4)`, which starts at w = 1; a weight that falls
    below zero gets no gradient any more. "sum" (`WeightedLayerPooling` of sentence-transformers): `a = w / sum w`,
    negative weights allowed. Softmax logits move slowly: give them 10 to 100 times the learning rate of matrices.

    Args:
        dense: fuse the patches, too.
        start: "uniform", or "last" (softmax only) for nearly all weight on the deepest layer.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        normalisation: str = "softmax",
        temperature: float = 1.0,
        start: str = "uniform",
        dense: bool = False,
        norm: str = "per_layer",
        direct: bool = False,
    ):
        needs, residuals = (("cls", "patches"), ("global", "patch")) if dense else (("cls",), ("global",))
        super().__init__(num_layers, hidden_size, needs=needs, residuals=residuals, norm=norm, direct=direct)
        check_choice("normalisation", normalisation, NORMALISATIONS)
        check_choice("start", start, ("uniform", "last") if normalisation == "softmax" else ("uniform",))
        if temperature <= 0:
            raise ValueError(f"expected a temperature above 0, got {temperature}")
        self.normalisation, self.temperature, self.start, self.dense = normalisation, temperature, start, dense
        self.layer_logits = nn.Parameter(torch.empty(num_layers))
        self.scale = nn.Parameter(torch.empty(1))
        self.set_start_values()

    def set_start_values(self) -> None:
        super().set_start_values()
        init.constant_(self.layer_logits, 0.0 if self.normalisation == "softmax" else 1.0)
        if self.start == "last":
            last = torch.arange(self.num_layers, device=self.layer_logits.device) == self.num_layers - 1
            init.copy_(self.layer_logits, LAST_LOGIT * last)
        init.ones_(self.scale)

    def forward(self, tokens: LayerTokens, output_attentions: bool = False) -> FusedTokens:
        weights = normalised(self.layer_logits, self.normalisation, self.temperature)  # (layers,)
        pooled = self.scale * torch.einsum("l,blc->bc", weights, self.normed_cls(tokens))
        pooled = self.residual("global", tokens.base_cls, pooled)
        patches = None
        if self.dense:
            patches = self.scale * torch.einsum("l,blnc->bnc", weights, self.normed_patches(tokens))
            patches = self.residual("patch", tokens.base_patches, patches)
        return FusedTokens(pooled=pooled, patches=patches, layer_weights=weights)


def normalised(weights: Tensor, normalisation: str, temperature: float = 1.0) -> Tensor:
    """Weights of the layers (layers,) from their free parameters."""
    if normalisation == "softmax":
        return (weights / temperature).softmax(dim=0)
    if normalisation == "fast":
        weights = weights.relu()
        return weights / (weights.sum() + FAST_EPS)
    return weights / weights.sum()

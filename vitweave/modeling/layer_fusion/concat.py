"""Concatenation of the layers and one projection."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.layer_fusion.base import FusedTokens, LayerFusion, LayerTokens, check_choice, layer_norms

CONNECTORS = (None, "sti", "sci", "dci")
STI_WINDOW = 8  # patches that one extra token averages, in row order (released code of arXiv:2405.13800)


class ConcatFusion(LayerFusion):
    """`W [x_1; ...; x_L] + b` over the selected layers, as in the linear probes of DINO and DINOv2 (arXiv:2304.07193).

    The simplest strong baseline, but a risky one: with all layers it can lose to the last layer alone.

    `connector` takes the groupings of Dense Connector (arXiv:2405.13800), which put the encoder's own output first:
    "sci" concatenates `[base; x_1; ...; x_L]`; "dci" `[base; mean of the first half of the layers; mean of the second]`
    (an odd layer in the middle counts in both); "sti" concatenates the layers as usual and returns the patches of every
    layer, averaged over 8 in row order, as `extra_tokens`. The direct form starts as the last layer, or with "sci" and
    "dci" as the encoder's output.

    Args:
        dense: project the concatenated patches, too, with a projection of their own.
        include_mean_patch: append the mean patch of the last layer to the [CLS] tokens (DINOv2's rule). Its norm acts
            on the mean.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        dense: bool = False,
        include_mean_patch: bool = False,
        connector: str | None = None,
        norm: str = "per_layer",
        direct: bool = False,
    ):
        check_choice("connector", connector, CONNECTORS)
        reads = {"patches": dense or connector == "sti", "patch_means": include_mean_patch}
        needs = ["cls", *(name for name, is_read in reads.items() if is_read)]
        residuals = ("global", "patch") if dense else ("global",)
        super().__init__(num_layers, hidden_size, needs=needs, residuals=residuals, norm=norm, direct=direct)
        self.dense, self.include_mean_patch, self.connector = dense, include_mean_patch, connector
        if include_mean_patch and norm == "per_layer":
            self.norm_mean = layer_norms(1, hidden_size)  # only the last layer's mean is read
        num_parts = {"sci": num_layers + 1, "dci": 3}.get(connector, num_layers)
        kept = 0 if connector in ("sci", "dci") else num_layers - 1

        def projection(parts: int) -> nn.Linear:
            if direct:
                return KeepPart(hidden_size, parts, kept)
            return nn.Linear(parts * hidden_size, hidden_size)

        self.proj = projection(num_parts + include_mean_patch)
        if dense:
            self.patch_proj = projection(num_parts)

    def forward(self, tokens: LayerTokens, output_attentions: bool = False) -> FusedTokens:
        parts = connect(tokens.base_cls, self.normed_cls(tokens), self.connector)
        if self.include_mean_patch:
            mean = tokens.mean_patches()[:, -1]
            parts.append(self.norm_mean[0](mean) if self.norm_kind == "per_layer" else mean)
        pooled = self.residual("global", tokens.base_cls, self.proj(torch.cat(parts, dim=-1)))
        states = self.normed_patches(tokens) if "patches" in self.needs else None
        patches = None
        if self.dense:
            parts = connect(tokens.base_patches, states, self.connector)
            patches = self.residual("patch", tokens.base_patches, self.patch_proj(torch.cat(parts, dim=-1)))
        extra = pool_in_row_order(states, tokens.patch_mask) if self.connector == "sti" else None
        return FusedTokens(pooled=pooled, patches=patches, extra_tokens=extra)


class KeepPart(nn.Linear):
    """Projection of several parts to one that starts by handing on part `kept`."""

    def __init__(self, part_size: int, num_parts: int, kept: int):
        super().__init__(num_parts * part_size, part_size)
        self.num_parts, self.kept = num_parts, kept
        self.set_start_values()

    def set_start_values(self) -> None:
        """Identity on the part that is kept, zero elsewhere."""
        size = self.out_features
        before, behind = self.kept * size, (self.num_parts - 1 - self.kept) * size
        init.copy_(self.weight, F.pad(torch.eye(size, device=self.weight.device), (before, behind)))
        init.zeros_(self.bias)


def connect(base: Tensor, states: Tensor, connector: str | None) -> list[Tensor]:
    """The parts that are concatenated on the channel axis.

    Args:
        base: (batch, ..., hidden), the encoder's own output.
        states: (batch, layers, ..., hidden).
    """
    if connector == "dci":
        num_layers = states.shape[1]
        first, second = states[:, : (num_layers + 1) // 2], states[:, num_layers // 2 :]
        return [base, first.mean(dim=1), second.mean(dim=1)]
    return [base, *states.unbind(1)] if connector == "sci" else list(states.unbind(1))


def pool_in_row_order(states: Tensor, mask: Tensor | None = None) -> Tensor:
    """Means of `STI_WINDOW` valid patches that follow each other, the last one of what is left.

    Args:
        states: (batch, layers, patches, hidden).
        mask: (batch, patches), True = valid.

    Returns:
        (batch, layers * ceil(patches / STI_WINDOW), hidden), layer after layer; zero where no patch is valid.
    """
    patches = states.shape[2]
    valid = torch.ones(1, 1, patches, 1, dtype=torch.bool, device=states.device)
    valid = valid if mask is None else mask[:, None, :, None]
    missing = (0, 0, 0, -patches % STI_WINDOW)
    sums = F.pad(states.masked_fill(~valid, 0), missing).unflatten(2, (-1, STI_WINDOW)).sum(dim=3)
    counts = F.pad(valid, missing).unflatten(2, (-1, STI_WINDOW)).sum(dim=3)
    return (sums / counts.clamp(min=1)).flatten(1, 2)

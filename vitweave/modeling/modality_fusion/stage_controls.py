"""The two simplest fusions of the maps that a stage returns, to compare the others with: a sum, and a projection."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.modality_fusion.base import BlockInputs, ModalityFusion, hide_absent, keep_unfused


class AdditionFusion(ModalityFusion):
    """Every stream becomes its mean with all others that are there: addition, at the scale of one stream."""

    position = "stage"

    def forward(self, streams: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor | None]:
        there = hide_absent(streams, inputs.present)
        if inputs.present is None:
            return there.mean(dim=0, keepdim=True).expand_as(there), None
        count = inputs.present.sum(dim=0).clamp(min=1)[None, :, None, None]
        mean = (there.sum(dim=0, keepdim=True) / count).to(there.dtype).expand_as(there)
        return keep_unfused(mean, streams, inputs.present), None


class ConcatenationFusion(ModalityFusion):
    """Every stream becomes a projection of all streams side by side; it starts as the stream itself.

    An absent stream counts as zeros; one that is alone passes unchanged.
    """

    position = "stage"

    def __init__(self, num_modalities: int, hidden_size: int):
        super().__init__(num_modalities, hidden_size)
        self.weight = nn.Parameter(torch.empty(num_modalities, hidden_size, num_modalities * hidden_size))
        self.bias = nn.Parameter(torch.empty(num_modalities, hidden_size))
        self.set_start_values()

    def set_start_values(self) -> None:
        """The identity."""
        count, size = self.num_modalities, self.hidden_size
        own = torch.eye(count * size, device=self.weight.device).unflatten(0, (count, size))
        init.copy_(self.weight, own)
        init.zeros_(self.bias)

    def forward(self, streams: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor | None]:
        joined = hide_absent(streams, inputs.present).movedim(0, -2).flatten(-2)  # (batch, tokens, M * hidden)
        fused = torch.einsum("btc,mhc->mbth", joined, self.weight) + self.bias[:, None, None]
        return keep_unfused(fused, streams, inputs.present), None

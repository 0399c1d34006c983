"""Layers with weights per modality, and what fusions ask about sensors that are absent."""

import torch
from torch import Tensor, nn
from transformers import initialization as init


class ModalityLinear(nn.Module):
    """One linear layer per modality, computed at once; `weight` (modalities, out, in), `bias` (modalities, out).

    Starts as in the released encoders: weights from a normal distribution cut off at two of its widths, biases zero.
    """

    def __init__(self, num_modalities: int, in_features: int, out_features: int, bias: bool = True, std: float = 0.02):
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(num_modalities, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_modalities, out_features)) if bias else None
        self.set_start_values()

    def set_start_values(self) -> None:
        init.trunc_normal_(self.weight, std=self.std, a=-2 * self.std, b=2 * self.std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, streams: Tensor) -> Tensor:
        """(modalities, ..., in) to (modalities, ..., out)."""
        rows, weight = streams.flatten(1, -2), self.weight.transpose(1, 2)
        out = torch.bmm(rows, weight) if self.bias is None else torch.baddbmm(self.bias[:, None], rows, weight)
        return out.unflatten(1, streams.shape[1:-1])


class PerModality(nn.ModuleList):
    """A layer of its own for every modality: streams (modalities, ...), each through its layer."""

    def forward(self, streams: Tensor) -> Tensor:
        return torch.stack([layer(stream) for layer, stream in zip(self, streams, strict=True)])


def has_company(present: Tensor) -> Tensor:
    """Where a sensor and at least one other are present; `present` and result (modalities, batch)."""
    return present & (present.sum(dim=0) > 1)


def part_of_present(counts: Tensor, present: Tensor | None) -> Tensor:
    """Mean over the images where the sensor is present of `counts` (modalities, batch), detached, (modalities,)."""
    counts = counts.detach().float()
    if present is None:
        return counts.mean(dim=1)
    return (counts * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)

"""What the modality fusions share: aligned streams of several sensors, and what a block tells about itself."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init

POSITIONS = ("norm", "attention", "branch", "stage")


@dataclass
class BlockInputs:
    """What a fusion may read besides the streams.

    Args:
        residual: (modalities, batch, tokens, hidden), what the block got, before its first norm.
        grid: (height, width), tokens = prefix + height * width, row by row.
        present: (modalities, batch), bool, False where a sensor is absent; None where all are there. What an absent
            stream holds is undefined and must not reach another one.
        scales: (modalities, hidden), the weights of the norm that the streams have just passed; position "norm" only.
        num_prefix_tokens: class tokens and registers in front, which belong to no place.
    """

    residual: Tensor
    grid: tuple[int, int]
    present: Tensor | None = None
    scales: Tensor | None = None
    num_prefix_tokens: int = 0


class ModalityFusion(nn.Module):
    """Aligned streams of several modalities to as many streams that have seen each other.

    A fusion takes `(num_modalities, hidden_size, **its own options)`. It maps streams (modalities, batch, tokens,
    hidden) and `BlockInputs` to streams of the same shape and a penalty, a scalar that is added to the loss, or None.
    All streams are read before any is changed. Where every other sensor is absent, a stream passes unchanged.

    `position` says where in a block it acts: "norm", on the normed tokens that attention reads; "attention", on what
    the heads return, before the output projection (Swin: behind it); "branch", on what the output projection returns;
    "stage", on the maps that a stage returns.

    `shared_by_stage`: one instance serves all blocks of a stage.

    `makes_map`: besides, `fused_map(streams, inputs)` makes one map of what it returned, (batch, tokens, hidden), and
    that is what heads read; position "stage" only.

    `last_exchange_ratio`: (modalities,), the part of the tokens or channels that the last forward replaced, for
    logging; None where a fusion replaces none.
    """

    position = "attention"
    shared_by_stage = False
    makes_map = False

    def __init__(self, num_modalities: int, hidden_size: int):
        super().__init__()
        if num_modalities < 2:
            raise ValueError(f"expected at least two modalities to fuse, got num_modalities={num_modalities}")
        self.num_modalities, self.hidden_size = num_modalities, hidden_size
        self.last_exchange_ratio: Tensor | None = None

    def forward(self, streams: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


class ModalityNorm(nn.Module):
    """LayerNorm with a weight and a bias per modality."""

    def __init__(self, num_modalities: int, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_modalities, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_modalities, hidden_size))

    def set_start_values(self) -> None:
        """As a LayerNorm."""
        init.ones_(self.weight)
        init.zeros_(self.bias)

    def forward(self, streams: Tensor) -> Tensor:
        """(modalities, ..., hidden)."""
        shape = (self.weight.shape[0], *(1,) * (streams.ndim - 2), streams.shape[-1])
        normed = torch.nn.functional.layer_norm(streams, streams.shape[-1:], eps=self.eps)
        return normed * self.weight.view(shape) + self.bias.view(shape)


def others(streams: Tensor) -> Tensor:
    """For each modality all others, the next one first: (modalities, ...) to (modalities, others, ...), new memory."""
    each = streams.unsqueeze(1)
    found = [each.roll(-step, dims=0) for step in range(1, streams.shape[0])]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def hide_absent(streams: Tensor, present: Tensor | None) -> Tensor:
    """Streams (modalities, batch, tokens, hidden) with zeros where a sensor is absent."""
    return streams if present is None else streams.masked_fill(~present[:, :, None, None], 0)


def keep_unfused(fused: Tensor, streams: Tensor, present: Tensor | None) -> Tensor:
    """`fused` where a stream and at least one other are present, the stream as it was elsewhere."""
    if present is None:
        return fused
    changed = present & others(present).any(dim=1)  # (modalities, batch)
    return torch.where(changed[:, :, None, None], fused, streams)

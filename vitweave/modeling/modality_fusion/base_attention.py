"""Projections of attention between modalities, one set for each stream that is updated."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.modality_fusion.base import ModalityFusion

FORMS = ("released", "paper")
STARTS = ("identity", "released")


class ModalityLinear(nn.Module):
    """A Linear with a weight and a bias per modality, all modalities in one batched product.

    Args:
        num_modalities: how many weights; 1 for one that all modalities share.
        in_features, out_features: as in a Linear.
        bias: whether there is one.
    """

    def __init__(self, num_modalities: int, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_modalities, out_features, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(num_modalities, out_features)) if bias else None)

    def forward(self, streams: Tensor, shift: Tensor | None = None) -> Tensor:
        """`(x + shift) W^T + b`.

        Args:
            streams: (modalities, ..., in).
            shift: (num_modalities, in) or None.
        """
        to_out = self.weight.mT  # (num_modalities, in, out)
        rows = streams.reshape(self.weight.shape[0], -1, streams.shape[-1])
        offset = None if self.bias is None else self.bias.unsqueeze(1)
        if shift is not None:  # behind the product it is a single row
            row = torch.bmm(shift.unsqueeze(1), to_out)
            offset = row if offset is None else offset + row
        out = torch.bmm(rows, to_out) if offset is None else torch.baddbmm(offset, rows, to_out)
        return out.view(*streams.shape[:-1], -1)


class AttentionUnits(ModalityFusion):
    """Query, key, value and output projections with which each stream reads the others.

    A bias of the keys adds the same to every score of a query, so the softmax cancels it: checkpoints hold one, which
    `key_bias` keeps for the way back, without effect and out of training.

    Args:
        num_modalities, hidden_size: as in every fusion.
        num_heads: of the attention.
        form: "released": projections per stream, with biases and an output projection. "paper": one query, key and
            value projection for all streams, one head, no biases, no output projection.
        start: "identity": the last projection (the output's; the value's where there is no other) is zero, so that a
            pretrained encoder is not disturbed. "released": nothing is zero.
    """

    def __init__(self, num_modalities: int, hidden_size: int, num_heads: int, form: str, start: str):
        super().__init__(num_modalities, hidden_size)
        for option, value, known in (("form", form, FORMS), ("start", start, STARTS)):
            if value not in known:
                raise ValueError(f"expected {option} to be one of {list(known)}, got {value!r}")
        self.num_heads, self.form, self.start = 1 if form == "paper" else num_heads, form, start
        if self.num_heads < 1 or hidden_size % self.num_heads:
            raise ValueError(f"expected num_heads to divide hidden_size={hidden_size}, got {num_heads}")
        units, bias = (1, False) if form == "paper" else (num_modalities, True)
        self.to_query = ModalityLinear(units, hidden_size, hidden_size, bias)
        self.to_key = ModalityLinear(units, hidden_size, hidden_size, bias=False)
        self.to_value = ModalityLinear(units, hidden_size, hidden_size, bias)
        if bias:
            self.to_output = ModalityLinear(units, hidden_size, hidden_size)
            self.register_buffer("key_bias", torch.empty(units, hidden_size))

    def set_start_values(self) -> None:
        """As the released code (packed Xavier projection, truncated normal output), or that with a zero at the end."""
        for layer in (self.to_query, self.to_key, self.to_value):
            limit = (6 / (self.hidden_size + 3 * self.hidden_size)) ** 0.5  # of the three packed in one matrix
            init.uniform_(layer.weight, -limit, limit)
        last = self.to_value
        if self.form == "released":
            init.trunc_normal_(self.to_output.weight, std=0.02)
            for bias in (self.to_query.bias, self.key_bias, self.to_value.bias, self.to_output.bias):
                init.zeros_(bias)
            last = self.to_output
        if self.start == "identity":
            init.zeros_(last.weight)

    def by_head(self, states: Tensor) -> Tensor:
        """(..., hidden) to (..., heads, width)."""
        return states.unflatten(-1, (self.num_heads, -1))

    def output(self, states: Tensor) -> Tensor:
        """What is added to the streams."""
        return states if self.form == "paper" else self.to_output(states)

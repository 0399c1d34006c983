"""The logits of several streams as one."""

import torch
from torch import Tensor, nn
from transformers import initialization as init


class ModalityEnsemble(nn.Module):
    """Weighted mean of the logits of all present streams (section 3.3 of arXiv:2011.05005).

    The logits are read without gradient: a loss on the mean teaches the weights, and each stream has a loss of its own.
    The released GeminiFusion and TokenFusion of NYUDv2 and SUN RGB-D never train the weights, so that theirs are equal.

    Args:
        num_streams: of one stream the logits are passed on as they are.
        trained: False weighs all alike.
    """

    def __init__(self, num_streams: int, trained: bool = True):
        super().__init__()
        self.num_streams = num_streams
        self.alpha = nn.Parameter(torch.ones(num_streams)) if trained and num_streams > 1 else None

    def set_start_values(self) -> None:
        """Equal weights."""
        if self.alpha is not None:
            init.ones_(self.alpha)

    def weights(self, logits: Tensor, present: Tensor | None) -> Tensor:
        """(streams, batch), sums to 1 over the present streams and is 0 for the others."""
        alpha = logits.new_ones(self.num_streams) if self.alpha is None else self.alpha
        scores = alpha[:, None].expand(logits.shape[:2])
        if present is not None:
            scores = scores.masked_fill(~present, float("-inf"))
        return scores.softmax(dim=0)

    def forward(self, logits: Tensor, present: Tensor | None = None) -> Tensor:
        """Logits (streams, batch, labels, height, width) to (batch, labels, height, width).

        Args:
            present: (streams, batch), bool; None where all are there.
        """
        if self.num_streams == 1:
            return logits[0]
        return torch.einsum("mb,mblhw->blhw", self.weights(logits, present), logits.detach())

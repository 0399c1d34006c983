"""Streams of sensors of which some may be absent."""

import torch
from torch import Tensor


def split_modalities(pixel_values: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Images to streams; what an absent sensor shows, NaN included, is replaced by zeros before anything reads it.

    Args:
        pixel_values: (batch, modalities, channels, height, width).
        present: (batch, modalities), bool, or None where all are there.

    Returns:
        (modalities, batch, channels, height, width) and present (modalities, batch).
    """
    if present is None:
        return pixel_values.transpose(0, 1), None
    pixel_values = pixel_values.masked_fill(~present[..., None, None, None], 0)
    return pixel_values.transpose(0, 1), present.transpose(0, 1)


def mean_over_present(streams: Tensor, present: Tensor | None) -> Tensor:
    """(streams, batch, ...) to (batch, ...), the mean over the streams that are there."""
    if streams.shape[0] == 1:
        return streams[0]
    if present is None:
        return streams.mean(dim=0)
    absent = ~present.view(*present.shape, *(1,) * (streams.ndim - 2))
    count = present.sum(dim=0).clamp_min(1).view(-1, *(1,) * (streams.ndim - 2))
    return streams.masked_fill(absent, 0).sum(dim=0) / count.to(streams.dtype)


def keep_some(present: Tensor, rate: float) -> Tensor:
    """Leave modalities out at random, but never all that are there.

    Args:
        present: (batch, modalities), bool.
        rate: the probability of each to be left out.
    """
    draws = torch.rand(present.shape, device=present.device).masked_fill(~present, -1)
    spared = torch.zeros_like(present).scatter(1, draws.argmax(dim=1, keepdim=True), True)
    return ((draws >= rate) | spared) & present


def one_batch(streams: Tensor) -> Tensor:
    """(modalities, batch, ...) to (modalities * batch, ...), for layers that know no axis of modalities."""
    # torch.export cannot show of the view that it is contiguous for every size of the batch
    return torch.cat(streams.unbind()) if torch.compiler.is_exporting() else streams.flatten(0, 1)

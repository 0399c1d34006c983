"""Channels whose norm has all but switched them off are taken over from the other sensors (channel exchange)."""

import torch
from torch import Tensor

from vitweave.modeling.modality_fusion.base import BlockInputs, ModalityFusion
from vitweave.modeling.modality_layers import has_company, part_of_present


class ChannelExchangeFusion(ModalityFusion):
    """Channel exchange (CEN, arXiv:2011.05005) behind the norm of every modality.

        x_m'[c] = x_m[c] if |scale_m[c]| >= threshold else mean of x_o[c] over the other modalities o

    from all x at once. Which channels change depends on the scales of the norm, not on the image. The fusion has no
    parameters; its penalty, the sum of |scale|, drives scales to zero, and of each modality it takes another part of
    the channels (of two, the first half and the second half), so that no channel is exchanged in both directions. On
    all channels, or too strong, it lets all scales collapse. The released code adds it once per output (weight 2e-4,
    three outputs) in segmentation, and once (1e-3) in translation, where the threshold is 0.01.

    The released networks are convolutional, with BatchNorm in ResNet bottlenecks and InstanceNorm in translation; here
    it acts on the first norm of a block of any encoder. `exchange_channels` is the same for any map.

    Absent sensors lend nothing, and the mean is over those that are present.

    Start: the scales of a norm start at one, so that a new fusion is the identity.

    Args:
        threshold: a channel with a smaller scale is replaced; equal keeps it.
    """

    position = "norm"

    def __init__(self, num_modalities: int, hidden_size: int, *, threshold: float = 0.02):
        super().__init__(num_modalities, hidden_size)
        self.threshold = threshold

    def forward(self, streams: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_exporting():
            replaced = (inputs.scales.abs().float() < self.threshold).float().mean(dim=1)
            company = has_company(inputs.present) if inputs.present is not None else torch.ones_like(replaced)[:, None]
            self.last_exchange_ratio = part_of_present(replaced[:, None] * company, inputs.present)
        exchanged = exchange_channels(streams, inputs.scales, self.threshold, inputs.present)
        return exchanged, sparsity_penalty(inputs.scales)


def exchange_channels(streams: Tensor, scales: Tensor, threshold: float, present: Tensor | None = None) -> Tensor:
    """
    Args:
        streams: (modalities, batch, ..., channels), normed.
        scales: (modalities, channels), weights of that norm.
        present: (modalities, batch), bool; None where all are there.

    Returns:
        As `streams`, channels with small scales replaced by the mean over the other modalities.
    """
    small = scales.abs().float() < threshold
    replaced = small.view(small.shape[0], *(1,) * (streams.ndim - 2), small.shape[1])
    if present is not None:
        shape = (*present.shape, *(1,) * (streams.ndim - 2))
        streams = streams.masked_fill(~present.view(shape), 0)
        replaced = replaced & has_company(present).view(shape)
    return torch.where(replaced, mean_of_others(streams, present), streams)


def mean_of_others(streams: Tensor, present: Tensor | None) -> Tensor:
    """Per modality the mean over the others that are present; absent ones hold zeros."""
    modalities = streams.shape[0]
    if modalities == 2:
        return streams.flip(0)
    others = ~torch.eye(modalities, dtype=torch.bool, device=streams.device)
    weights = others.to(streams.dtype) / (modalities - 1)
    if present is None:
        return torch.einsum("mo,ob...->mb...", weights, streams)
    weights = (others[:, :, None] & present).to(streams.dtype)  # (modality, other, batch)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.einsum("mob,ob...->mb...", weights, streams)


def sparsity_penalty(scales: Tensor) -> Tensor:
    """Sum of |scale| over the modality's own part of the channels; `scales` (modalities, channels)."""
    modalities, channels = scales.shape
    edges = torch.arange(modalities + 1, device=scales.device) * channels // modalities
    channel = torch.arange(channels, device=scales.device)
    own = (channel >= edges[:-1, None]) & (channel < edges[1:, None])  # (modalities, channels)
    return scales.abs().masked_fill(~own, 0).sum(dtype=torch.promote_types(scales.dtype, torch.float32))

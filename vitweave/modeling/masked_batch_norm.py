"""Batch normalisation that leaves rows of the batch out, or that never moves."""

import torch.nn.functional as F
from torch import Tensor, nn


class MaskedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose statistics in training are those of the valid rows of the batch.

    Args:
        frozen: normalise by the running statistics in training, too, and leave them as they are. They start at mean 0
            and variance 1, with which the layer is a factor and a shift per channel.
    """

    def __init__(self, num_features: int, frozen: bool = False, eps: float = 1e-5):
        super().__init__(num_features, eps)
        self.frozen = frozen

    def forward(self, maps: Tensor, valid: Tensor | None = None) -> Tensor:
        """Maps (batch, channels, height, width); valid (batch,), bool, or None where all rows count."""
        if self.training and not self.frozen and valid is not None:
            return self.normalise_by_valid(maps, valid)
        if self.frozen:
            return F.batch_norm(maps, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(maps)

    def normalise_by_valid(self, maps: Tensor, valid: Tensor) -> Tensor:
        """As BatchNorm2d in training with the other rows taken out of the batch; those are normalised with the rest."""
        wide = maps.double() if maps.dtype.itemsize == 8 else maps.float()
        counted = valid.view(-1, 1, 1, 1)
        count = valid.sum().clamp_min(1) * (maps.shape[2] * maps.shape[3])
        mean = wide.masked_fill(~counted, 0).sum(dim=(0, 2, 3)) / count  # (channels,)
        centred = wide - mean.view(1, -1, 1, 1)
        variance = centred.masked_fill(~counted, 0).square().sum(dim=(0, 2, 3)) / count
        unbiased = variance.detach() * count / (count - 1).clamp_min(1)
        self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked.add_(1)
        scale = (self.weight * (variance + self.eps).rsqrt()).view(1, -1, 1, 1)
        return (centred * scale + self.bias.view(1, -1, 1, 1)).to(maps.dtype)

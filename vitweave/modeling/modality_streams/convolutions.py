"""Convolutions of the stream encoders."""

from torch import nn
from transformers import initialization as init


class FanOutConv(nn.Conv2d):
    """Convolution that starts as in MiT: normal weights of variance 2 / fan-out, no bias (arXiv:2105.15203)."""

    def reset_parameters(self) -> None:
        self.set_start_values()

    def set_start_values(self) -> None:
        """Loaded weights stay as they are."""
        fan_out = self.kernel_size[0] * self.kernel_size[1] * self.out_channels / self.groups
        init.normal_(self.weight, std=(2 / fan_out) ** 0.5)
        if self.bias is not None:
            init.zeros_(self.bias)

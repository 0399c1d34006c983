"""Three and more sensors in two streams: all but the first are merged (GeminiFusion and CMNeXt on DeLiVER)."""

import torch
from torch import Tensor, nn

from vitweave.modeling.modality_streams.convolutions import FanOutConv


class AuxiliaryMerge(nn.Module):
    """The streams of all sensors but the first, scaled by a score per token and merged by their maximum.

    One score net per sensor: a depth-wise 3x3 convolution, a 1x1 convolution to one channel, a sigmoid. All nets run
    as one, with a group of channels per sensor. (The released code holds one net more per stage, which it never uses.)
    """

    def __init__(self, num_auxiliaries: int, hidden_size: int):
        super().__init__()
        width = num_auxiliaries * hidden_size
        self.local = FanOutConv(width, width, kernel_size=3, padding=1, groups=width)
        self.score = FanOutConv(width, num_auxiliaries, kernel_size=1, groups=num_auxiliaries)

    def forward(
        self, streams: Tensor, grid: tuple[int, int], present: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """
        Args:
            streams: (modalities, batch, tokens, hidden), the main one first.
            present: (modalities, batch), bool.

        Returns:
            The main and the merged stream (2, batch, tokens, hidden), the scaled ones (modalities - 1, batch, tokens,
            hidden), and which of the two are there (2, batch).
        """
        main, others = streams[:1], streams[1:]
        maps = others.permute(1, 0, 3, 2).flatten(1, 2).unflatten(2, grid)  # (batch, others * hidden, height, width)
        scores = self.score(self.local(maps)).sigmoid()  # (batch, others, height, width)
        scaled = others * (1 + scores.flatten(2).transpose(0, 1).unsqueeze(3))
        if present is None:
            return torch.cat([main, scaled.amax(dim=0, keepdim=True)]), scaled, None
        some = present[1:].any(dim=0, keepdim=True)  # (1, batch)
        merged = scaled.masked_fill(~present[1:, :, None, None], float("-inf")).amax(dim=0, keepdim=True)
        merged = torch.where(some[..., None, None], merged, 0)
        return torch.cat([main, merged]), scaled, torch.cat([present[:1], some])

"""A high-resolution encoder adds to a low-resolution ViT between its blocks, and once more behind it (LLaVA-HR)."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.configuration.encoder_fusion_plans import Grid, plan_mixture_of_resolution
from vitweave.modeling.encoder_fusion.base import EncoderFusion, EncoderMaps
from vitweave.modeling.grid_matching import align_ac, map_to_tokens
from vitweave.modeling.layer_fusion.base import FeedForward
from vitweave.modeling.start_values import start_as_in_torch


class MixtureOfResolutionAdapter(nn.Module):
    """The MR-Adapter of LLaVA-HR (arXiv:2403.03003): `F -> U + g * S` for the fast map F and the slow map H.

    `U = F + fast_proj(gelu(fast_conv(F)))` with a depthwise 7x7 convolution,
    `S = align_ac(slow_proj(gelu(slow_conv(H))))` with 1x1 convolutions on H's own grid, and the gate
    `g = tanh(fc2(gelu(fc1([mean of U, mean of S]))))`. Both projections start at zero, so a new adapter returns F bit
    for bit. S is then zero, so the gate gets its first gradient one step after `slow_proj`, and `fast_conv` and
    `slow_conv` one step after the projections.

    Args:
        fast_channels: of F.
        slow_channels: of H.
        gate: as in `MixtureOfResolutionFusion`.
        gate_input: as in `MixtureOfResolutionFusion`.
    """

    def __init__(self, fast_channels: int, slow_channels: int, gate: str = "scalar", gate_input: str = "updated"):
        super().__init__()
        self.reads_update = gate_input == "updated"
        self.fast_conv = nn.Conv2d(fast_channels, fast_channels, 7, padding=3, groups=fast_channels)
        self.fast_proj = nn.Conv2d(fast_channels, fast_channels, 1)
        self.slow_conv = nn.Conv2d(slow_channels, slow_channels, 1)
        self.slow_proj = nn.Conv2d(slow_channels, fast_channels, 1)
        gates = 1 if gate == "scalar" else fast_channels
        self.gate = FeedForward(2 * fast_channels, max(1, fast_channels // 2), gates)
        self.set_start_values()

    def set_start_values(self) -> None:
        """The convolutions Xavier-uniform, the projections behind them zero, no bias; the gate as torch draws it."""
        for conv in (self.fast_conv, self.slow_conv):
            init.xavier_uniform_(conv.weight)
            init.zeros_(conv.bias)
        for proj in (self.fast_proj, self.slow_proj):
            init.zeros_(proj.weight)
            init.zeros_(proj.bias)
        start_as_in_torch(self.gate)

    def project_slow(self, slow: Tensor) -> Tensor:
        """(batch, slow channels, height, width) to (batch, fast channels, height, width), on its own grid."""
        return self.slow_proj(F.gelu(self.slow_conv(slow)))

    def forward(self, fast: Tensor, slow: Tensor) -> Tensor:
        """
        Args:
            fast: F, (batch, fast channels, height, width).
            slow: H, (batch, slow channels, slow height, slow width).

        Returns:
            (batch, fast channels, height, width).
        """
        detail = align_ac(self.project_slow(slow), (fast.shape[2], fast.shape[3]))
        fast = fast.contiguous()  # a ViT's map is a view of its tokens, on which depthwise convolutions are slow
        if self.reads_update:
            fast = seen = fast + self.fast_proj(F.gelu(self.fast_conv(fast)))
        else:
            seen = self.fast_proj(F.gelu(self.fast_conv(fast)))
            fast = fast + seen
        means = torch.cat([seen.mean(dim=(2, 3)), detail.mean(dim=(2, 3))], dim=1)  # (batch, 2 * fast channels)
        gate = self.gate(means).tanh()  # (batch, 1 or fast channels)
        return torch.addcmul(fast, gate[:, :, None, None], detail)


class MixtureOfResolutionFusion(EncoderFusion):
    """Mixture-of-resolution adaptation of LLaVA-HR (arXiv:2403.03003).

    Encoder 0 is the fast path, a ViT that sees a small image; encoder 1 the slow one, a convnet that sees a large one.
    The last map of the slow path feeds an MR-Adapter after each of `adapter_layers` blocks of the fast one
    (`injections`). Behind both, the tokens are `fast_proj(F) + slow_proj(align_ac(H))`, Linear layers that start as
    torch draws them. Defaults are the released code, which the released checkpoints need; the paper has a gate per
    channel that reads the two branches, and adds F as it is.

    Grids: the slow one has the sides of the fast one, or divisors of them (then it is brought up with bilinear_ac), or
    multiples (then it is averaged over whole blocks). LLaVA-HR's encoders, with strides 14 and 32 and a small image
    of max(side / 32 * 14, 336), so take images of side 256, 384 and every multiple of 32 from 768.

    Args:
        adapter_layers: numbers of blocks of encoder 0 after which an adapter acts; empty for the model of the first
            training stage, which has none.
        gate: "scalar", one gate per image (code), or "vector", one per channel (paper).
        gate_input: "updated" to let the gate read the means of U and S (code), or "branches" for those of
            `fast_proj(gelu(fast_conv(F)))` and S (paper).
        projects: "both" (code), or "slow" for `F + slow_proj(align_ac(H))` (paper).
    """

    injects = True

    def __init__(
        self,
        in_channels: Sequence[int],
        grids: Sequence[Grid],
        hidden_size: int | None = None,
        *,
        adapter_layers: Sequence[int] = (6, 12, 18),
        gate: str = "scalar",
        gate_input: str = "updated",
        projects: str = "both",
    ):
        options = {"adapter_layers": adapter_layers, "gate": gate, "gate_input": gate_input, "projects": projects}
        super().__init__(partial(plan_mixture_of_resolution, in_channels, hidden_size=hidden_size, **options), grids)
        self.adapter_layers = tuple(adapter_layers)
        self.adapters = nn.ModuleList(
            MixtureOfResolutionAdapter(*in_channels, gate=gate, gate_input=gate_input) for _ in self.adapter_layers
        )
        self.fast_proj = nn.Linear(in_channels[0], in_channels[0]) if projects == "both" else nn.Identity()
        self.slow_proj = nn.Linear(in_channels[1], in_channels[0])

    def set_start_values(self) -> None:
        """The final alignment as torch draws it."""
        start_as_in_torch(self.fast_proj)
        start_as_in_torch(self.slow_proj)

    def injections(self, slow_map: Tensor) -> dict[int, Callable[[Tensor], Tensor]]:
        """By number of blocks, what takes the map of encoder 0 after them and returns the one that goes on.

        Args:
            slow_map: (batch, channels, height, width) of encoder 1.
        """
        return {
            layer: partial(adapter, slow=slow_map)
            for layer, adapter in zip(self.adapter_layers, self.adapters, strict=True)
        }

    def forward(self, features: EncoderMaps) -> Tensor:
        """The final alignment; the first map has been through the adapters. (batch, tokens, channels of encoder 0)."""
        fast, slow = features.maps
        slow = align_ac(slow, (fast.shape[2], fast.shape[3]))
        return self.fast_proj(map_to_tokens(fast)) + self.slow_proj(map_to_tokens(slow))

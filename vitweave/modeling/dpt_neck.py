"""The neck of DPT: maps of several layers become one pyramid, refined from coarse to fine (arXiv:2103.13413)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitweave.modeling.heads.base import DeepConv, DeepConvTranspose, resize_map

READOUTS = ("ignore", "add", "project")


class Reassemble(nn.Module):
    """One layer's map, with its class token read in, at the width and size of its place in the pyramid.

    Args:
        factor: how many times finer than the given map the result is; a whole number, or 1 / a whole number.
        readout: what becomes of the class token: "ignore" it, "add" it to every patch, or "project" the two together.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: float, readout: str):
        super().__init__()
        self.adds = readout == "add"
        self.readout = nn.Linear(2 * in_channels, in_channels) if readout == "project" else None
        self.projection = DeepConv(in_channels, out_channels, kernel_size=1)
        self.resize = nn.Identity()
        if factor > 1:
            self.resize = DeepConvTranspose(out_channels, out_channels, kernel_size=int(factor), stride=int(factor))
        elif factor < 1:
            stride = round(1 / factor)
            self.resize = DeepConv(out_channels, out_channels, kernel_size=3, stride=stride, padding=1)

    def forward(self, feature_map: Tensor, class_token: Tensor | None) -> Tensor:
        """Map (batch, in_channels, height, width) to (batch, out_channels, ~height * factor, ~width * factor)."""
        if self.adds:
            feature_map = feature_map + class_token[:, :, None, None]
        elif self.readout is not None:
            spread = class_token[:, :, None, None].expand_as(feature_map)
            pairs = torch.cat([feature_map, spread], dim=1).movedim(1, -1)  # (batch, height, width, 2 * channels)
            feature_map = F.gelu(self.readout(pairs)).movedim(-1, 1)
        return self.resize(self.projection(feature_map))


class ResidualConv(nn.Module):
    """Two 3x3 convolutions with the activations in front, beside the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = DeepConv(channels, channels, kernel_size=3, padding=1)
        self.conv2 = DeepConv(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.conv2(self.conv1(hidden.relu()).relu())


class Refine(nn.Module):
    """One step of RefineNet (arXiv:1611.06612): take in the next finer map, and upsample.

    Args:
        merges: False for the coarsest step, which has nothing to take in.
    """

    def __init__(self, channels: int, merges: bool):
        super().__init__()
        self.merge = ResidualConv(channels) if merges else None
        self.residual = ResidualConv(channels)
        self.projection = DeepConv(channels, channels, kernel_size=1)

    def forward(self, coarse: Tensor, finer: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Maps (batch, channels, height, width) to the same at `size` = (height, width)."""
        if self.merge is not None:
            coarse = coarse + self.merge(resize_map(finer, coarse.shape[-2:]))
        hidden = self.projection(self.residual(coarse))  # before the upsampling: the same numbers at a quarter of cost
        return F.interpolate(hidden, size=size, mode="bilinear", align_corners=True)


class DptNeck(nn.Module):
    """Maps of several layers, shallow to deep, to maps of one width, each refined by all that are coarser.

    A plain ViT's maps are all of one size: they are resampled to a pyramid first. Every step is upsampled to exactly
    the size of the next finer map, so odd grids and the maps of hierarchical encoders fit; where each map is twice as
    fine as the next, that is the published doubling.

    Args:
        in_channels: one entry per map, shallow to deep.
        neck_sizes: channels of the pyramid, one per map. None: those of the maps where they differ (hierarchical
            encoders); else the full width for the deepest map and half as much for each one before it, as in Depth
            Anything (arXiv:2401.10891).
        fusion_size: channels of all results; 64 is Depth Anything's small model, 256 DPT.
        factors: how many times finer each map becomes. None: 1 where the maps' widths differ; else 4, 2, 1, 1/2, ...
        readout: "ignore", "add" or "project" the class token, see `Reassemble`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        neck_sizes: Sequence[int] | None = None,
        fusion_size: int = 64,
        factors: Sequence[float] | None = None,
        readout: str = "project",
    ):
        super().__init__()
        if readout not in READOUTS:
            raise ValueError(f"unknown readout {readout!r}; known: {sorted(READOUTS)}")
        count, one_size = len(in_channels), len(set(in_channels)) == 1
        if factors is None:
            factors = [2.0 ** max(2 - place, -1) if one_size else 1.0 for place in range(count)]
        if neck_sizes is None:
            halvings = [count - 1 - place if one_size else 0 for place in range(count)]
            neck_sizes = [max(width >> n, 1) for width, n in zip(in_channels, halvings, strict=True)]
        for name, given in (("neck_sizes", neck_sizes), ("factors", factors)):
            if len(given) != count:
                raise ValueError(f"expected one entry of {name} per map, {count} in all, got {list(given)}")
        wrong = [f for f in factors if f <= 0 or abs(max(f, 1 / f) - round(max(f, 1 / f))) > 1e-6]
        if wrong:
            raise ValueError(f"expected factors that are whole numbers or 1 / whole numbers, got {wrong}")
        self.reassemble = nn.ModuleList(
            Reassemble(width, size, factor, readout)
            for width, size, factor in zip(in_channels, neck_sizes, factors, strict=True)
        )
        self.laterals = nn.ModuleList(
            DeepConv(size, fusion_size, kernel_size=3, padding=1, bias=False) for size in neck_sizes
        )
        self.refine = nn.ModuleList(Refine(fusion_size, merges=step > 0) for step in range(count))
        self.fusion_size = fusion_size
        self.reads_class_tokens = readout != "ignore"

    def forward(self, feature_maps: Sequence[Tensor], class_tokens: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Refine the maps.

        Args:
            feature_maps: (batch, channels_k, height_k, width_k), shallow to deep.
            class_tokens: one (batch, channels_k) per map; None where the readout is "ignore".

        Returns:
            one (batch, fusion_size, height, width) per map, coarse to fine; the last is twice as fine as the finest
            map of the pyramid.
        """
        if class_tokens is None:
            class_tokens = [None] * len(feature_maps)
        pyramid = [
            lateral(reassemble(feature_map, token))
            for lateral, reassemble, feature_map, token in zip(
                self.laterals, self.reassemble, feature_maps, class_tokens, strict=True
            )
        ]
        pyramid.reverse()  # coarse to fine
        sizes = [level.shape[-2:] for level in pyramid[1:]]
        sizes.append(tuple(2 * length for length in pyramid[-1].shape[-2:]))
        refined, hidden = [], pyramid[0]
        for refine, level, size in zip(self.refine, pyramid, sizes, strict=True):
            hidden = refine(hidden, level, size)
            refined.append(hidden)
        return refined

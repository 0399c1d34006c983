"""Random maps of several encoders, as a tower would hand them to an encoder fusion."""

from collections.abc import Sequence

import torch
from torch import nn

from vitweave.modeling.encoder_fusion.base import EncoderMaps


def random_maps(
    channels: Sequence[int] = (32, 48),
    grids: Sequence[tuple[int, int]] = ((4, 6), (4, 6)),
    prefixes: Sequence[int] | None = None,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> EncoderMaps:
    """`prefixes`: class tokens and registers of every encoder."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    maps = [noise(batch, width, *grid) for width, grid in zip(channels, grids, strict=True)]
    kept = [
        noise(batch, count, width) if count else None for width, count in zip(channels, prefixes or (), strict=False)
    ]
    return EncoderMaps(maps, kept)


def image(features: EncoderMaps, index: int) -> EncoderMaps:
    """One image of the batch."""
    part = slice(index, index + 1)
    kept = [None if prefix is None else prefix[part] for prefix in features.prefixes]
    return EncoderMaps([feature_map[part] for feature_map in features.maps], kept)


def cast(features: EncoderMaps, dtype: torch.dtype) -> EncoderMaps:
    """The same in another type."""
    kept = [None if prefix is None else prefix.to(dtype) for prefix in features.prefixes]
    return EncoderMaps([feature_map.to(dtype) for feature_map in features.maps], kept)


def trained(fusion: nn.Module, seed: int = 1) -> nn.Module:
    """The fusion with random values added to every parameter, as if training had moved them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.3)
    return fusion

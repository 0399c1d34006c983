"""The layers that turn the maps of several streams into images again."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.modality_fusion.base import ModalityNorm
from vitweave.modeling.modality_streams.base import StreamOutput
from vitweave.modeling.modality_streams.convolutions import FanOutConv
from vitweave.modeling.modality_streams.mit import MitLayer


class UpStep(nn.Module):
    """To a finer grid: the channels of a cell become its sub-cells, then a 1x1 convolution. All streams share it.

    Args:
        factor: sub-cells per side; its square divides `in_channels`.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: int):
        super().__init__()
        if in_channels % factor**2:
            raise ValueError(
                f"a stage of {in_channels} channels and stride {factor} cannot be taken back: expected a multiple of"
                f" {factor**2} in stream_config.hidden_sizes"
            )
        self.factor = factor
        self.proj = FanOutConv(in_channels // factor**2, out_channels, kernel_size=1)

    def forward(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """(streams, batch, channels, height, width) to (streams, batch, out channels, *size); what exceeds is cut."""
        shuffled = F.pixel_shuffle(maps.flatten(0, 1), self.factor)[..., : size[0], : size[1]]
        return self.proj(shuffled).unflatten(0, maps.shape[:2])


class TranslationStage(nn.Module):
    """An up-step to the grid of an encoder stage, its map added, and as many blocks as it has, without fusion."""

    def __init__(self, config: ModalityFusionConfig, stage: int, drop_path_rates: list[float]):
        super().__init__()
        stream = config.stream_config
        width = stream.hidden_sizes[stage]
        self.up = UpStep(stream.hidden_sizes[stage + 1], width, stream.strides[stage + 1])
        self.blocks = nn.ModuleList(MitLayer(config, stage, rate, fuses=False) for rate in drop_path_rates)
        self.layer_norm = ModalityNorm(config.num_streams, width, config.layer_norm_eps)

    def forward(self, maps: Tensor, skip: Tensor) -> Tensor:
        """Maps of the coarser stage and of the encoder at this one, (streams, batch, channels, height, width)."""
        grid = (skip.shape[-2], skip.shape[-1])
        streams = (self.up(maps, grid) + skip).flatten(3).transpose(2, 3)  # (streams, batch, tokens, hidden)
        for block in self.blocks:
            streams, _ = block(streams, grid, None, None)
        return self.layer_norm(streams).transpose(2, 3).unflatten(3, grid)


class TranslationDecoder(nn.Module):
    """The encoder backwards, every stage but the last with its map, to an image per stream in (-1, 1).

    The generator of TokenFusion (arXiv:2204.08721). Its code holds a norm after every up-step that it never uses; ours
    has none. A block drops paths at the rate of the encoder's block at its place.
    """

    def __init__(self, config: ModalityFusionConfig):
        super().__init__()
        stream = config.stream_config
        total = sum(stream.depths)
        rates = [config.drop_path_rate * index / max(total - 1, 1) for index in range(total)]
        self.stages = nn.ModuleList()
        for stage in reversed(range(len(stream.depths) - 1)):
            start = sum(stream.depths[:stage])
            self.stages.append(TranslationStage(config, stage, rates[start : start + stream.depths[stage]]))
        width = stream.hidden_sizes[0]
        self.up = UpStep(width, width, stream.strides[0])
        self.project = nn.Conv2d(width, stream.num_channels, kernel_size=1)  # small at first: tanh has a slope

    def forward(self, output: StreamOutput, pixel_values: Tensor) -> Tensor:
        """Images (streams, batch, channels, height, width) of the sensors' size."""
        maps, size = output.maps[-1], (pixel_values.shape[-2], pixel_values.shape[-1])
        for stage, skip in zip(self.stages, reversed(output.maps[:-1]), strict=True):
            maps = stage(maps, skip)
        return self.project(self.up(maps, size).flatten(0, 1)).tanh().unflatten(0, maps.shape[:2])


def mean_where(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of what counts, a scalar; 0 where nothing does. What does not count may be NaN."""
    kept = torch.where(counted, values, 0)
    return kept.sum() / counted.expand_as(values).sum().clamp_min(1)

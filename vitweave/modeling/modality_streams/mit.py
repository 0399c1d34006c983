"""SegFormer's encoder (MiT) for several aligned modalities."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.modality_fusion.base import BlockInputs, ModalityFusion, ModalityNorm
from vitweave.modeling.modality_layers import PerModality
from vitweave.modeling.modality_streams.auxiliary import AuxiliaryMerge
from vitweave.modeling.modality_streams.base import ModalityStreams, StreamOutput
from vitweave.modeling.modality_streams.block_fusions import BlockFusion, StagePlan, new_fusion, plan_fusions
from vitweave.modeling.modality_streams.convolutions import FanOutConv
from vitweave.modeling.modality_streams.fusing_stage import FusingStage, FusionRecord
from vitweave.modeling.modality_streams.loading import fill_streams
from vitweave.modeling.modality_streams.present import one_batch, split_modalities
from vitweave.modeling.specialized_layers import eager_attention
from vitweave.modeling.tokens import DropPath, tokens_to_map


def layer_of_all(config: ModalityFusionConfig, count: int, build: Callable[[], nn.Module]) -> nn.Module:
    """One layer for all streams, or one for each of `count`, as the config says."""
    return build() if config.shared_weights else PerModality(build() for _ in range(count))


def on_maps(layer: nn.Module, streams: Tensor, grid: tuple[int, int]) -> Tensor:
    """Run a convolution on tokens: (modalities, batch, tokens, hidden) -> (modalities, batch, tokens', hidden')."""
    if isinstance(layer, PerModality):
        return torch.cat([on_maps(own, stream[None], grid) for own, stream in zip(layer, streams, strict=True)])
    maps = layer(tokens_to_map(one_batch(streams), grid))
    return maps.flatten(2).transpose(1, 2).unflatten(0, streams.shape[:2])


def conv_norm_eps(config: ModalityFusionConfig) -> float:
    """Epsilon of the norms behind strided convolutions."""
    return config.layer_norm_eps if config.conv_norm_eps is None else config.conv_norm_eps


class MitPatchEmbeddings(nn.Module):
    """Overlapping patches by a strided convolution, and a norm per modality."""

    def __init__(self, config: ModalityFusionConfig, stage: int):
        super().__init__()
        stream, kernel = config.stream_config, config.stream_config.patch_sizes[stage]
        channels = stream.num_channels if stage == 0 else stream.hidden_sizes[stage - 1]
        width = stream.hidden_sizes[stage]
        stride, count = stream.strides[stage], config.num_modalities
        self.proj = layer_of_all(
            config, count, lambda: FanOutConv(channels, width, kernel, stride, padding=kernel // 2)
        )
        self.layer_norm = ModalityNorm(count, width, conv_norm_eps(config))

    def forward(self, maps: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(modalities, batch, channels, height, width) to tokens (modalities, batch, tokens, hidden) and their grid."""
        if isinstance(self.proj, PerModality):
            patches = self.proj(maps)  # (modalities, batch, hidden, height', width')
        else:
            patches = self.proj(one_batch(maps)).unflatten(0, maps.shape[:2])
        return self.layer_norm(patches.flatten(3).transpose(2, 3)), (patches.shape[3], patches.shape[4])


class MitSequenceReduction(nn.Module):
    """The tokens that become keys and values: each of a ratio x ratio cell; what fills no whole cell is left out."""

    def __init__(self, config: ModalityFusionConfig, hidden_size: int, ratio: int):
        super().__init__()
        count = config.num_streams
        self.sequence_reduction = layer_of_all(
            config, count, lambda: FanOutConv(hidden_size, hidden_size, ratio, ratio)
        )
        self.layer_norm = ModalityNorm(count, hidden_size, conv_norm_eps(config))

    def forward(self, streams: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.layer_norm(on_maps(self.sequence_reduction, streams, grid))


class MitAttention(nn.Module):
    """Attention of every stream to itself, with a fusion between the heads and the output projection or behind it."""

    def __init__(self, config: ModalityFusionConfig, stage: int):
        super().__init__()
        stream, width = config.stream_config, config.stream_config.hidden_sizes[stage]
        self.config = config
        self.num_heads = stream.num_attention_heads[stage]
        self.head_dim = width // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = stream.attention_probs_dropout_prob
        self.is_causal = False
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, layer_of_all(config, config.num_streams, lambda: nn.Linear(width, width)))
        ratio = stream.sr_ratios[stage]
        self.sequence_reduction = MitSequenceReduction(config, width, ratio) if ratio > 1 else None

    def to_heads(self, projected: Tensor) -> Tensor:
        """(modalities, batch, tokens, hidden) -> (modalities * batch, heads, tokens, head size)."""
        return one_batch(projected).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

    def forward(self, streams: Tensor, grid: tuple[int, int], fuse: BlockFusion) -> Tensor:
        reduced = streams if self.sequence_reduction is None else self.sequence_reduction(streams, grid)
        query = self.to_heads(self.q_proj(streams))
        key, value = self.to_heads(self.k_proj(reduced)), self.to_heads(self.v_proj(reduced))
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.dropout if self.training else 0.0
        context, _ = attend(self, query, key, value, None, scaling=self.scaling, dropout=dropout)
        mixed = context.reshape(streams.shape)  # (batch, tokens, heads, head size): heads side by side
        return fuse("branch", self.o_proj(fuse("attention", mixed)))


class MitDepthWiseConv(nn.Module):
    """A 3x3 convolution per channel, by which the tokens know where they are."""

    def __init__(self, config: ModalityFusionConfig, channels: int):
        super().__init__()
        self.dwconv = layer_of_all(
            config,
            config.num_streams,
            lambda: FanOutConv(channels, channels, kernel_size=3, padding=1, groups=channels),
        )

    def forward(self, streams: Tensor, grid: tuple[int, int]) -> Tensor:
        return on_maps(self.dwconv, streams, grid)


class MitMixMLP(nn.Module):
    """Linear, depth-wise convolution, activation, linear."""

    def __init__(self, config: ModalityFusionConfig, stage: int):
        super().__init__()
        stream, width = config.stream_config, config.stream_config.hidden_sizes[stage]
        wide, count = int(width * stream.mlp_ratios[stage]), config.num_streams
        self.fc1 = layer_of_all(config, count, lambda: nn.Linear(width, wide))
        self.dwconv = MitDepthWiseConv(config, wide)
        self.activation_fn = ACT2FN[stream.hidden_act]
        self.fc2 = layer_of_all(config, count, lambda: nn.Linear(wide, width))
        self.dropout = nn.Dropout(stream.hidden_dropout_prob)

    def forward(self, streams: Tensor, grid: tuple[int, int]) -> Tensor:
        hidden = self.dropout(self.activation_fn(self.dwconv(self.fc1(streams), grid)))
        return self.dropout(self.fc2(hidden))


class MitLayer(GradientCheckpointingLayer):
    """A block of all streams: attention and Mix-FFN, each behind a norm per stream.

    Args:
        fuses: whether it has a fusion of its own; one that the stage's blocks share comes with the call.
    """

    def __init__(self, config: ModalityFusionConfig, stage: int, drop_path_rate: float, fuses: bool):
        super().__init__()
        width = config.stream_config.hidden_sizes[stage]
        self.layernorm_before = ModalityNorm(config.num_streams, width, config.layer_norm_eps)
        self.attention = MitAttention(config, stage)
        self.hidden_dropout = nn.Dropout(config.stream_config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path_rate)
        self.layernorm_after = ModalityNorm(config.num_streams, width, config.layer_norm_eps)
        self.mlp = MitMixMLP(config, stage)
        self.fusion = new_fusion(config, width) if fuses else None

    def add_branch(self, streams: Tensor, branch: Tensor) -> Tensor:
        """The residual sum; every sample of every modality is dropped on its own."""
        return streams + self.drop_path(one_batch(branch)).unflatten(0, branch.shape[:2])

    def forward(
        self, streams: Tensor, grid: tuple[int, int], present: Tensor | None, shared: ModalityFusion | None
    ) -> tuple[Tensor, Tensor | None]:
        """(modalities, batch, tokens, hidden) to the same and the fusion's penalty."""
        fuse = BlockFusion(shared if self.fusion is None else self.fusion, BlockInputs(streams, grid, present))
        normed = fuse("norm", self.layernorm_before(streams), self.layernorm_before.weight)
        streams = self.add_branch(streams, self.hidden_dropout(self.attention(normed, grid, fuse)))
        streams = self.add_branch(streams, self.mlp(self.layernorm_after(streams), grid))
        return streams, fuse.penalty


class MitStage(FusingStage):
    """Patch embeddings, blocks and a norm, at one resolution."""

    def __init__(self, config: ModalityFusionConfig, stage: int, drop_path_rates: list[float], plan: StagePlan):
        super().__init__(f"stage{stage + 1}", plan)
        width = config.stream_config.hidden_sizes[stage]
        self.patch_embeddings = MitPatchEmbeddings(config, stage)
        merged = config.num_streams < config.num_modalities
        self.auxiliary = AuxiliaryMerge(config.num_modalities - 1, width) if merged else None
        self.blocks = nn.ModuleList(
            MitLayer(config, stage, rate, fuses) for rate, fuses in zip(drop_path_rates, self.own_fusions, strict=True)
        )
        self.layer_norm = ModalityNorm(config.num_streams, width, config.layer_norm_eps)

    def forward(
        self, maps: Tensor, present: Tensor | None, record: FusionRecord
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """
        Args:
            maps: (modalities, batch, channels, height, width), what the stage before passed on.
            present: (modalities, batch).

        Returns:
            What the next stage reads (modalities, batch, hidden, height, width); of the streams, of which there are two
            where all but the first are merged, the maps (streams, batch, hidden, height, width), the tokens (streams,
            batch, tokens, hidden), and which of them are there.
        """
        streams, grid = self.patch_embeddings(maps)
        scaled = None
        if self.auxiliary is not None:
            streams, scaled, present = self.auxiliary(streams, grid, present)
        streams = self.layer_norm(self.run_blocks(streams, grid, present, record))
        streams = self.fuse_maps(streams, grid, present, record)
        maps = streams.transpose(2, 3).unflatten(3, grid)
        if scaled is None:
            return maps, maps, streams, present
        others = scaled.transpose(2, 3).unflatten(3, grid) + maps[1:]
        return torch.cat([maps[:1], others]), maps, streams, present


class MitStreams(ModalityStreams):
    """MiT B0 to B5 (arXiv:2105.15203) whose weights serve all modalities but for the norms, with fusions in its blocks.

    Parameters are named as in transformers' SegFormer; a norm holds one row per modality. Every norm has the epsilon
    `config.layer_norm_eps`, 1e-6 as in the code behind GeminiFusion's and TokenFusion's checkpoints. transformers'
    SegFormer has 1e-5 whatever its config says, and NVIDIA's code 1e-5 in two kinds of norms (`config.conv_norm_eps`):
    the same weights give features that differ by about 1e-5.

    With `shared_weights=False` every layer stands there once per modality, numbered (`q_proj.0`, `q_proj.1`), and only
    the fusions join the streams.
    """

    def __init__(self, config: ModalityFusionConfig):
        super().__init__()
        stream = config.stream_config
        self.channels = list(stream.hidden_sizes)
        self.strides = [math.prod(stream.strides[: stage + 1]) for stage in range(len(stream.depths))]
        total = sum(stream.depths)
        rates = [config.drop_path_rate * index / max(total - 1, 1) for index in range(total)]
        plans = plan_fusions(config, stream.depths, stream.hidden_sizes)
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(stream.depths):
            start = sum(stream.depths[:stage])
            self.stages.append(MitStage(config, stage, rates[start : start + depth], plans[stage]))

    def forward(
        self, pixel_values: Tensor, present: Tensor | None = None, num_stages: int | None = None
    ) -> StreamOutput:
        passed_on, present = split_modalities(pixel_values, present)
        found, record = [], FusionRecord()
        for stage in self.stages[:num_stages]:
            passed_on, maps, tokens, seen = stage(passed_on, present, record)
            found.append(maps)
        return StreamOutput(tuple(found), tokens, seen, record.penalty, record.ratios, record.fused_maps)

    def get_input_embeddings(self) -> nn.Module:
        return self.stages[0].patch_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.stages[0].patch_embeddings = value

    def load_encoder(self, encoder: PreTrainedModel) -> None:
        """Take the weights of a transformers SegFormer (`SegformerModel`), whose names are ours."""
        fill_streams(self, encoder.state_dict())

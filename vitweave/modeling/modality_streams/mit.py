"""SegFormer's encoder (MiT) for several aligned modalities."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.modality_fusion.base import BlockInputs, ModalityFusion, ModalityNorm
from vitweave.modeling.modality_streams.auxiliary import AuxiliaryMerge
from vitweave.modeling.modality_streams.base import ModalityStreams, StreamOutput
from vitweave.modeling.modality_streams.block_fusions import (
    BlockFusion,
    StagePlan,
    exchange_ratio,
    new_fusion,
    plan_fusions,
    summed,
)
from vitweave.modeling.modality_streams.convolutions import FanOutConv
from vitweave.modeling.modality_streams.present import split_modalities
from vitweave.modeling.specialized_layers import eager_attention
from vitweave.modeling.tokens import DropPath, tokens_to_map


def on_maps(layer: Callable, streams: Tensor, grid: tuple[int, int]) -> Tensor:
    """Run a convolution on tokens: (modalities, batch, tokens, hidden) -> (modalities, batch, tokens', hidden')."""
    maps = layer(tokens_to_map(streams.flatten(0, 1), grid))
    return maps.flatten(2).transpose(1, 2).unflatten(0, streams.shape[:2])


class MitPatchEmbeddings(nn.Module):
    """Overlapping patches by one strided convolution for all, and a norm per modality."""

    def __init__(self, config: ModalityFusionConfig, stage: int):
        super().__init__()
        stream, kernel = config.stream_config, config.stream_config.patch_sizes[stage]
        channels = stream.num_channels if stage == 0 else stream.hidden_sizes[stage - 1]
        width = stream.hidden_sizes[stage]
        self.proj = FanOutConv(channels, width, kernel, stream.strides[stage], padding=kernel // 2)
        self.layer_norm = ModalityNorm(config.num_modalities, width, config.layer_norm_eps)

    def forward(self, maps: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(modalities, batch, channels, height, width) to tokens (modalities, batch, tokens, hidden) and their grid."""
        patches = self.proj(maps.flatten(0, 1))
        tokens = patches.flatten(2).transpose(1, 2).unflatten(0, maps.shape[:2])
        return self.layer_norm(tokens), (patches.shape[2], patches.shape[3])


class MitSequenceReduction(nn.Module):
    """The tokens that become keys and values: each of a ratio x ratio cell; what fills no whole cell is left out."""

    def __init__(self, config: ModalityFusionConfig, hidden_size: int, ratio: int):
        super().__init__()
        self.sequence_reduction = FanOutConv(hidden_size, hidden_size, ratio, ratio)
        self.layer_norm = ModalityNorm(config.num_streams, hidden_size, config.layer_norm_eps)

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
            setattr(self, name, nn.Linear(width, width))
        ratio = stream.sr_ratios[stage]
        self.sequence_reduction = MitSequenceReduction(config, width, ratio) if ratio > 1 else None

    def to_heads(self, projected: Tensor) -> Tensor:
        """(modalities, batch, tokens, hidden) -> (modalities * batch, heads, tokens, head size)."""
        return projected.flatten(0, 1).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

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

    def __init__(self, channels: int):
        super().__init__()
        self.dwconv = FanOutConv(channels, channels, kernel_size=3, padding=1, groups=channels)

    def forward(self, streams: Tensor, grid: tuple[int, int]) -> Tensor:
        return on_maps(self.dwconv, streams, grid)


class MitMixMLP(nn.Module):
    """Linear, depth-wise convolution, activation, linear."""

    def __init__(self, config: ModalityFusionConfig, stage: int):
        super().__init__()
        stream, width = config.stream_config, config.stream_config.hidden_sizes[stage]
        wide = int(width * stream.mlp_ratios[stage])
        self.fc1 = nn.Linear(width, wide)
        self.dwconv = MitDepthWiseConv(wide)
        self.activation_fn = ACT2FN[stream.hidden_act]
        self.fc2 = nn.Linear(wide, width)
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
        width, norm_args = config.stream_config.hidden_sizes[stage], (config.num_streams,)
        self.layernorm_before = ModalityNorm(*norm_args, width, config.layer_norm_eps)
        self.attention = MitAttention(config, stage)
        self.hidden_dropout = nn.Dropout(config.stream_config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path_rate)
        self.layernorm_after = ModalityNorm(*norm_args, width, config.layer_norm_eps)
        self.mlp = MitMixMLP(config, stage)
        self.fusion = new_fusion(config, width) if fuses else None

    def add_branch(self, streams: Tensor, branch: Tensor) -> Tensor:
        """The residual sum; every sample of every modality is dropped on its own."""
        return streams + self.drop_path(branch.flatten(0, 1)).unflatten(0, branch.shape[:2])

    def forward(
        self, streams: Tensor, grid: tuple[int, int], present: Tensor | None, shared: ModalityFusion | None
    ) -> tuple[Tensor, Tensor | None]:
        """(modalities, batch, tokens, hidden) to the same and the fusion's penalty."""
        fuse = BlockFusion(shared if self.fusion is None else self.fusion, BlockInputs(streams, grid, present))
        normed = fuse("norm", self.layernorm_before(streams), self.layernorm_before.weight)
        streams = self.add_branch(streams, self.hidden_dropout(self.attention(normed, grid, fuse)))
        streams = self.add_branch(streams, self.mlp(self.layernorm_after(streams), grid))
        return streams, fuse.penalty


class MitStage(nn.Module):
    """Patch embeddings, blocks and a norm, at one resolution."""

    def __init__(self, config: ModalityFusionConfig, stage: int, drop_path_rates: list[float], plan: StagePlan):
        super().__init__()
        width = config.stream_config.hidden_sizes[stage]
        self.patch_embeddings = MitPatchEmbeddings(config, stage)
        merged = config.num_streams < config.num_modalities
        self.auxiliary = AuxiliaryMerge(config.num_modalities - 1, width) if merged else None
        self.fusion, self.block_fuses = plan
        own = self.fusion is None
        self.blocks = nn.ModuleList(
            MitLayer(config, stage, rate, fuses and own)
            for rate, fuses in zip(drop_path_rates, self.block_fuses, strict=True)
        )
        self.layer_norm = ModalityNorm(config.num_streams, width, config.layer_norm_eps)

    def forward(self, maps: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor, StreamOutput]:
        """
        Args:
            maps: (modalities, batch, channels, height, width), what the stage before passed on.
            present: (modalities, batch).

        Returns:
            What the next stage reads (modalities, batch, hidden, height, width), and of this stage its one map, tokens,
            penalty and exchange ratios.
        """
        streams, grid = self.patch_embeddings(maps)
        scaled = None
        if self.auxiliary is not None:
            streams, scaled, present = self.auxiliary(streams, grid, present)
        penalties, ratios = [], {}
        for index, (block, fuses) in enumerate(zip(self.blocks, self.block_fuses, strict=True)):
            streams, penalty = block(streams, grid, present, self.fusion if fuses else None)
            penalties.append(penalty)
            self.note_ratio(ratios, f"block{index}", self.fusion_of(index))
        streams = self.layer_norm(streams)
        if self.fusion is not None and self.fusion.position == "stage":
            streams, penalty = self.fusion(streams, BlockInputs(streams, grid, present))
            penalties.append(penalty)
            self.note_ratio(ratios, "maps", self.fusion)
        maps = streams.transpose(2, 3).unflatten(3, grid)  # (modalities, batch, hidden, height, width)
        passed_on = maps
        if scaled is not None:
            passed_on = torch.cat([maps[:1], scaled.transpose(2, 3).unflatten(3, grid) + maps[1:]])
        return passed_on, StreamOutput((maps,), streams, present, summed(penalties), ratios)

    def fusion_of(self, index: int) -> nn.Module | None:
        """What fuses in a block: its own or the stage's."""
        own = self.blocks[index].fusion
        return self.fusion if own is None and self.block_fuses[index] else own

    @staticmethod
    def note_ratio(ratios: dict[str, Tensor], place: str, fusion: nn.Module | None):
        """Remember what was exchanged; a compiled graph keeps no record."""
        if not torch.compiler.is_compiling() and exchange_ratio(fusion) is not None:
            ratios[place] = exchange_ratio(fusion)


class MitStreams(ModalityStreams):
    """MiT B0 to B5 (arXiv:2105.15203) whose weights serve all modalities but for the norms, with fusions in its blocks.

    Parameters are named as in transformers' SegFormer; a norm holds one row per modality. Every norm has the epsilon
    `config.layer_norm_eps`, 1e-6 as in the code behind GeminiFusion's and TokenFusion's checkpoints. transformers'
    SegFormer has 1e-5 whatever its config says, and NVIDIA's code 1e-5 in two kinds of norms: the same weights give
    features that differ by about 1e-5.
    """

    def __init__(self, config: ModalityFusionConfig):
        super().__init__()
        stream = config.stream_config
        self.channels = list(stream.hidden_sizes)
        self.strides = [int(torch.tensor(stream.strides[: stage + 1]).prod()) for stage in range(len(stream.depths))]
        self.smallest_image = max(stride * ratio for stride, ratio in zip(self.strides, stream.sr_ratios, strict=True))
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
        maps, present = split_modalities(pixel_values, present)
        found, ratios = [], {}
        for index, stage in enumerate(self.stages[:num_stages], start=1):
            maps, output = stage(maps, present)
            found.append(output)
            ratios |= {f"stage{index}.{place}": ratio for place, ratio in output.exchange_ratios.items()}
        last = found[-1]
        penalty = summed([output.penalty for output in found])
        return StreamOutput(tuple(output.maps[0] for output in found), last.tokens, last.present, penalty, ratios)

    def get_input_embeddings(self) -> nn.Module:
        return self.stages[0].patch_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.stages[0].patch_embeddings = value

    def load_encoder(self, encoder: PreTrainedModel) -> None:
        """Take the weights of a transformers SegFormer: shared ones as they are, each norm's for every modality."""
        own = self.state_dict()
        norms = {
            f"{name}.{part}"
            for name, module in self.named_modules()
            if isinstance(module, ModalityNorm)
            for part in ("weight", "bias")
        }
        state = encoder.state_dict()
        for name, tensor in state.items():
            own[name] = tensor.expand_as(own[name]) if name in norms else tensor
        self.load_state_dict(own)

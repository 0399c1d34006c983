"""Swin for several aligned modalities."""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.configuration.reductions import as_pair
from vitweave.modeling.grid_matching import resample_positions
from vitweave.modeling.modality_fusion.base import BlockInputs, ModalityFusion, ModalityNorm
from vitweave.modeling.modality_fusion.registry import MODALITY_FUSIONS
from vitweave.modeling.modality_streams.auxiliary import AuxiliaryMerge
from vitweave.modeling.modality_streams.base import ModalityStreams, StreamOutput
from vitweave.modeling.modality_streams.block_fusions import BlockFusion, StagePlan, new_fusion, plan_fusions
from vitweave.modeling.modality_streams.fusing_stage import FusingStage, FusionRecord
from vitweave.modeling.modality_streams.loading import fill_streams
from vitweave.modeling.modality_streams.present import one_batch, split_modalities
from vitweave.modeling.modality_streams.windows import (
    WindowPositionBias,
    from_windows,
    pad_to_windows,
    relative_places,
    resize_bias_table,
    shift_mask,
    to_windows,
)
from vitweave.modeling.specialized_layers import eager_attention
from vitweave.modeling.tokens import DropPath

MERGE_EPS = 1e-5  # of the norm in patch merging, whatever the config says
RENAMES = (  # a transformers Swin's names -> ours, those of older releases included
    (r"^encoder\.layers\.", "stages."),
    (r"\.attention\.self\.(query|key|value)\.", lambda found: f".attention.{found[1][0]}_proj."),
    (r"\.attention\.self\.relative", ".attention.relative_position_bias.relative"),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)
NOT_TAKEN = ("layernorm.", "hidden_states_norms.", "embeddings.mask_token", "pooler.")


class SwinStreamEmbeddings(nn.Module):
    """Patches by one strided convolution for all, a norm per modality, and positions where the config wants them."""

    def __init__(self, config: ModalityFusionConfig):
        super().__init__()
        stream = config.stream_config
        self.patch_size, self.initializer_range = as_pair(stream.patch_size), config.initializer_range
        self.projection = nn.Conv2d(stream.num_channels, stream.embed_dim, self.patch_size, self.patch_size)
        self.norm = ModalityNorm(config.num_modalities, stream.embed_dim, config.layer_norm_eps)
        self.stored_grid = tuple(
            side // patch for side, patch in zip(as_pair(stream.image_size), self.patch_size, strict=True)
        )
        self.position_embeddings = None
        if stream.use_absolute_embeddings:
            places = self.stored_grid[0] * self.stored_grid[1]
            self.position_embeddings = nn.Parameter(torch.zeros(1, places, stream.embed_dim))
        self.dropout = nn.Dropout(stream.hidden_dropout_prob)
        self.set_start_values()

    def set_start_values(self) -> None:
        """Positions; a loaded table stays as it is."""
        if self.position_embeddings is not None:
            init.trunc_normal_(self.position_embeddings, std=self.initializer_range)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(modalities, batch, channels, height, width) to tokens (modalities, batch, tokens, hidden) and their grid.

        Images whose sides the patch does not divide get zeros to the right and below.
        """
        below, right = (-side % patch for side, patch in zip(images.shape[3:], self.patch_size, strict=True))
        patches = self.projection(F.pad(one_batch(images), (0, right, 0, below)))
        grid = patches.shape[2], patches.shape[3]
        tokens = self.norm(patches.flatten(2).transpose(1, 2).unflatten(0, images.shape[:2]))
        if self.position_embeddings is not None:
            tokens = tokens + resample_positions(self.position_embeddings, grid, False, stored=self.stored_grid)
        return self.dropout(tokens), grid


class SwinStreamAttention(nn.Module):
    """Attention of every window to itself, with a bias per relative place."""

    def __init__(self, config: ModalityFusionConfig, stage: int, width: int):
        super().__init__()
        stream = config.stream_config
        self.config, self.window_size = config, stream.window_size
        self.num_heads = stream.num_heads[stage]
        self.scaling = (width // self.num_heads) ** -0.5
        self.dropout = stream.attention_probs_dropout_prob
        self.is_causal = False
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(width, width, bias=stream.qkv_bias))
        self.o_proj = nn.Linear(width, width)
        self.relative_position_bias = WindowPositionBias(self.num_heads, self.window_size, config.initializer_range)

    def forward(self, maps: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
        """(batch, height, width, channels), whole windows, to the same.

        Args:
            places: (area, area), see `relative_places`.
            mask: (windows, 1, area, area), added to the scores; None lets all of a window see each other.
        """
        size, heads = self.window_size, self.num_heads
        query, key, value = (to_windows(getattr(self, f"{part}_proj")(maps), size, heads) for part in "qkv")
        bias = self.relative_position_bias(places)[None]  # (1, heads, area, area)
        windows = query.shape[1] // heads
        bias = bias.expand(windows, -1, -1, -1) if mask is None else bias + mask
        bias = bias.flatten(0, 1)[None].to(query.dtype)  # windows lie beside the heads: no copy per image
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.dropout if self.training else 0.0
        context, _ = attend(self, query, key, value, bias, scaling=self.scaling, dropout=dropout)
        return self.o_proj(from_windows(context, size, heads, maps.shape[2] // size))


class SwinStreamMLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config: ModalityFusionConfig, width: int):
        super().__init__()
        stream = config.stream_config
        self.fc1 = nn.Linear(width, int(stream.mlp_ratio * width))
        self.activation_fn = ACT2FN[stream.hidden_act]
        self.fc2 = nn.Linear(int(stream.mlp_ratio * width), width)

    def forward(self, streams: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(streams)))


class SwinStreamLayer(GradientCheckpointingLayer):
    """A block of all streams: window attention and MLP behind norms that all share.

    Args:
        shifted: whether its windows are cut half a window further down and right.
        fuses: whether it has a fusion of its own; one that the stage's blocks share comes with the call.
    """

    def __init__(
        self, config: ModalityFusionConfig, stage: int, drop_path_rate: float, shifted: bool, fuses: bool = False
    ):
        super().__init__()
        stream = config.stream_config
        width, eps = stream.embed_dim * 2**stage, stream.layer_norm_eps
        self.window_size = stream.window_size
        self.shift = self.window_size // 2 if shifted else 0
        self.layernorm_before = nn.LayerNorm(width, eps=eps)
        self.attention = SwinStreamAttention(config, stage, width)
        self.dropout = nn.Dropout(stream.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path_rate)
        self.layernorm_after = nn.LayerNorm(width, eps=eps)
        self.mlp = SwinStreamMLP(config, width)
        self.fusion = new_fusion(config, width) if fuses else None

    def attend(self, streams: Tensor, grid: tuple[int, int], places: Tensor, mask: Tensor) -> Tensor:
        """Window attention of normed streams: padded, shifted, and back."""
        maps = pad_to_windows(one_batch(streams).unflatten(1, grid), self.window_size)
        if self.shift:
            maps = maps.roll((-self.shift, -self.shift), dims=(1, 2))
        maps = self.attention(maps, places, mask if self.shift else None)
        if self.shift:
            maps = maps.roll((self.shift, self.shift), dims=(1, 2))
        return maps[:, : grid[0], : grid[1]].flatten(1, 2).unflatten(0, streams.shape[:2])

    def add_branch(self, streams: Tensor, branch: Tensor) -> Tensor:
        """The residual sum; every sample of every modality is dropped on its own."""
        return streams + self.drop_path(one_batch(self.dropout(branch))).unflatten(0, branch.shape[:2])

    def forward(
        self,
        streams: Tensor,
        grid: tuple[int, int],
        present: Tensor | None,
        shared: ModalityFusion | None,
        places: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """(streams, batch, tokens, hidden) to the same and the fusion's penalty.

        Args:
            places, mask: see `SwinStreamAttention`; only shifted blocks read the mask.
        """
        fuse = BlockFusion(shared if self.fusion is None else self.fusion, BlockInputs(streams, grid, present))
        attended = self.attend(self.layernorm_before(streams), grid, places, mask)
        streams = self.add_branch(streams, fuse("branch", fuse("attention", attended)))
        streams = self.add_branch(streams, self.mlp(self.layernorm_after(streams)))
        return streams, fuse.penalty


class SwinStreamMerging(nn.Module):
    """Four neighbours to one token of twice the width, for all modalities alike."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width, eps=MERGE_EPS)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, streams: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """(modalities, batch, tokens, hidden) to (modalities, batch, tokens / 4, 2 * hidden) and their grid."""
        maps = pad_to_windows(one_batch(streams).unflatten(1, grid), 2)
        corners = [maps[:, row::2, column::2] for column in range(2) for row in range(2)]
        merged = self.reduction(self.norm(torch.cat(corners, dim=-1)))
        return merged.flatten(1, 2).unflatten(0, streams.shape[:2]), (merged.shape[1], merged.shape[2])


class SwinStage(FusingStage):
    """Blocks at one resolution, a norm per stream of what they return, and the step to the next stage."""

    def __init__(self, config: ModalityFusionConfig, stage: int, drop_path_rates: list[float], plan: StagePlan):
        super().__init__(config.stage_names[stage], plan)
        width = config.stream_config.embed_dim * 2**stage
        merged = config.num_streams < config.num_modalities
        self.auxiliary = AuxiliaryMerge(config.num_modalities - 1, width) if merged else None
        self.window_size = config.stream_config.window_size
        self.blocks = nn.ModuleList(
            SwinStreamLayer(config, stage, rate, shifted=index % 2 == 1, fuses=fuses)
            for index, (rate, fuses) in enumerate(zip(drop_path_rates, self.own_fusions, strict=True))
        )
        last = stage == len(config.stream_config.depths) - 1
        self.downsample = None if last else SwinStreamMerging(width)
        self.layer_norm = ModalityNorm(config.num_streams, width, config.layer_norm_eps)

    def forward(
        self,
        streams: Tensor,
        grid: tuple[int, int],
        present: Tensor | None,
        places: Tensor,
        record: FusionRecord,
        go_on: bool,
    ) -> tuple[Tensor, tuple[int, int], Tensor, Tensor | None]:
        """
        Args:
            streams: (modalities, batch, tokens, hidden).
            present: (modalities, batch).
            go_on: whether there is a next stage.

        Returns:
            What the next stage reads (modalities, batch, tokens / 4, 2 * hidden), its grid, what this one returns,
            normed (streams, batch, tokens, hidden), and which streams are there.
        """
        scaled = None
        if self.auxiliary is not None:
            streams, scaled, present = self.auxiliary(streams, grid, present)
        padded = tuple(side + -side % self.window_size for side in grid)
        mask = shift_mask(padded, self.window_size, streams.device) if len(self.blocks) > 1 else None
        streams = self.run_blocks(streams, grid, present, record, places, mask)
        streams = self.fuse_maps(streams, grid, present, record)
        normed = self.layer_norm(streams)
        if not go_on:
            return streams, grid, normed, present
        passed_on = streams if scaled is None else torch.cat([streams[:1], scaled + streams[1:]])
        return *self.downsample(passed_on, grid), normed, present


class SwinStreams(ModalityStreams):
    """Swin (arXiv:2103.14030) whose weights serve all modalities, with fusions in its blocks, as in GeminiFusion.

    All modalities share the norms of the blocks and of patch merging, with the epsilon of the Swin (1e-5). A norm per
    modality follows the patch embedding and every stage (`config.layer_norm_eps`, 1e-6); the next stage reads what the
    stage's norm reads. A fusion of the positions "attention" and "branch" acts behind the window projection, un-shifted
    and cropped; one of position "stage" before the norm of the stage. Fusions of position "norm" want a norm per
    modality in the blocks, and are refused.

    Windows keep their size and shift on maps no larger than themselves, which are padded. transformers' `SwinModel`
    drops the shift there (its `SwinBackbone` keeps it), so on small maps the same weights give other features.

    Parameters are named as in transformers' Swin, with "stages" for "encoder.layers".
    """

    def __init__(self, config: ModalityFusionConfig):
        super().__init__()
        stream = config.stream_config
        fusion_class = MODALITY_FUSIONS.get(config.fusion_type)
        if fusion_class is not None and fusion_class.position == "norm":
            raise ValueError(
                f"{config.fusion_type!r} compares the norms of the modalities, but a Swin's blocks share theirs; take"
                " another fusion, or a MiT or ViT as stream_config"
            )
        depths, stages = list(stream.depths), range(len(stream.depths))
        self.channels = [stream.embed_dim * 2**stage for stage in stages]
        self.strides = [as_pair(stream.patch_size)[0] * 2**stage for stage in stages]
        self.smallest_image = 1
        self.window_size = stream.window_size
        self.embeddings = SwinStreamEmbeddings(config)
        total = sum(depths)
        rates = [config.drop_path_rate * index / max(total - 1, 1) for index in range(total)]
        plans = plan_fusions(config, depths, self.channels)
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(depths):
            start = sum(depths[:stage])
            self.stages.append(SwinStage(config, stage, rates[start : start + depth], plans[stage]))

    def forward(
        self, pixel_values: Tensor, present: Tensor | None = None, num_stages: int | None = None
    ) -> StreamOutput:
        images, present = split_modalities(pixel_values, present)
        streams, grid = self.embeddings(images)
        places = relative_places(self.window_size, streams.device)
        record, maps, stages = FusionRecord(), [], self.stages[:num_stages]
        for index, stage in enumerate(stages, start=1):
            size, go_on = grid, index < len(stages)
            streams, grid, tokens, there = stage(streams, grid, present, places, record, go_on)
            maps.append(tokens.transpose(2, 3).unflatten(3, size))
        return StreamOutput(tuple(maps), tokens, there, record.penalty, record.ratios, record.fused_maps)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def load_encoder(self, encoder: PreTrainedModel) -> None:
        """Take the weights of a transformers Swin: shared ones as they are, each norm's for every modality.

        The norms of the stages start as a backbone's own; of other models, which norm the last stage only, those of the
        stages before stay as they are. Tables of another window size are resampled.
        """
        state = {name.removeprefix("swin."): tensor for name, tensor in encoder.state_dict().items()}
        own = dict(self.named_parameters())
        tensors = {name: tensor for name, tensor in own.items() if ".layer_norm." in name}
        tensors = {name: tensor[0].detach().clone() for name, tensor in tensors.items()}
        for name, tensor in state.items():
            ours = name.replace("embeddings.patch_embeddings.", "embeddings.")
            for pattern, replacement in RENAMES:
                ours = re.sub(pattern, replacement, ours)
            if ours.endswith("relative_position_bias_table") and ours in own:
                tensor = resize_bias_table(tensor, own[ours].shape[0])
            if not ours.startswith(NOT_TAKEN) and not ours.endswith("relative_position_index"):
                tensors[ours] = tensor
        for index in range(len(self.stages)):
            for part in ("weight", "bias"):
                found = state.get(f"hidden_states_norms.stage{index + 1}.{part}")
                if found is None and index == len(self.stages) - 1:
                    found = state.get(f"layernorm.{part}")
                if found is not None:
                    tensors[f"stages.{index}.layer_norm.{part}"] = found
        fill_streams(self, tensors)

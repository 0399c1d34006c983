"""A plain ViT, specialised or not, for several aligned modalities."""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.configuration.configuration_specialized_vit import PARALLEL_LINEARS, SpecializedViTConfig
from vitweave.configuration.reductions import as_pair
from vitweave.modeling.modality_fusion.base import BlockInputs, ModalityFusion, ModalityNorm
from vitweave.modeling.modality_streams.auxiliary import AuxiliaryMerge
from vitweave.modeling.modality_streams.base import ModalityStreams, StreamOutput
from vitweave.modeling.modality_streams.block_fusions import BlockFusion, StagePlan, new_fusion, plan_fusions
from vitweave.modeling.modality_streams.fusing_stage import FusingStage, FusionRecord
from vitweave.modeling.modality_streams.loading import fill_streams
from vitweave.modeling.modality_streams.present import one_batch, split_modalities
from vitweave.modeling.modeling_specialized_vit import SpecializedViTModel, SpecializedViTTrunk
from vitweave.modeling.own_models import build_model
from vitweave.modeling.specialized_layers import SpecializedViTLayer, add_bias
from vitweave.modeling.tokens import by_role
from vitweave.modeling.vit_embeddings import RelativePositionBias, SpecializedViTEmbeddings, rotary_tables
from vitweave.modeling.vit_start_values import set_vit_start_values

VANILLA = {"norm_blocks": "none", "qkv_blocks": "none"}  # a specialised ViT that is none


def vit_of_streams(config: ModalityFusionConfig) -> SpecializedViTConfig:
    """The ViT that `config.stream_config` describes, as a specialised one without heads; vanilla ones have no twins."""
    stream: PreTrainedConfig = config.stream_config
    if stream.model_type == "specialized_vit":
        vit = copy.deepcopy(stream)
    else:
        from vitweave.modeling.conversion.registry import find_family  # no part of a published bundle

        family = find_family(stream)
        with torch.device("meta"):  # some facts are in no config
            vit = SpecializedViTConfig(**{**family.options(build_model(stream)), **VANILLA})
        vit._attn_implementation = stream._attn_implementation
    if vit.class_attention_layers:
        raise ValueError("streams have no class-attention layers; expected class_attention_layers=0")
    vit.use_pooler, vit.use_mask_token = False, False
    vit.drop_path_rate, vit.drop_path_decay = config.drop_path_rate, "linear"
    vit.num_hidden_layers = max(config.stage_layers)
    return vit


class FlatModalityNorm(ModalityNorm):
    """A norm per modality for the layers of a ViT, which know no axis of modalities."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(modalities * batch, tokens, hidden)."""
        batch = tokens.shape[0] // self.weight.shape[0]
        weight, bias = (rows.repeat_interleave(batch, dim=0).unsqueeze(1) for rows in (self.weight, self.bias))
        return torch.addcmul(bias, F.layer_norm(tokens, tokens.shape[-1:], eps=self.eps), weight)


class VitStreamLayer(SpecializedViTLayer):
    """A block of all streams: the specialised ViT's, with a norm per stream and the hooks of a fusion.

    Args:
        vit: the ViT.
        index: of the block in it.
        fuses: whether it has a fusion of its own; one that the stage's blocks share comes with the call.
    """

    def __init__(self, config: ModalityFusionConfig, vit: SpecializedViTConfig, index: int, fuses: bool):
        super().__init__(vit, index)
        self.vit = vit
        self.attention.run_config = config
        for name in ("norm1", "norm1_cls", "norm2", "norm2_cls"):
            if hasattr(self, name):
                setattr(self, name, FlatModalityNorm(config.num_streams, vit.hidden_size, vit.layer_norm_eps))
        self.fusion = new_fusion(config, vit.hidden_size) if fuses else None
        self.set_start_values()

    def set_start_values(self) -> None:
        """As in a ViT; the fusion has start values of its own."""
        for part in (self.attention, self.mlp, self.relative_position_bias, *self.layer_scales()):
            for module in () if part is None else part.modules():
                set_vit_start_values(module, self.vit)

    def layer_scales(self) -> list[nn.Module]:
        """Those of the patches and of the class tokens."""
        return [module for name, module in self.named_children() if name.startswith("layer_scale")]

    def forward(
        self,
        streams: Tensor,
        grid: tuple[int, int],
        present: Tensor | None,
        shared: ModalityFusion | None,
        bias: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(streams, batch, tokens, hidden) to the same and the fusion's penalty.

        Args:
            bias: (1, heads, tokens, tokens), added to the scores of attention.
        """
        inputs = BlockInputs(streams, grid, present, num_prefix_tokens=self.vit.num_prefix_tokens)
        hook = BlockFusion(shared if self.fusion is None else self.fusion, inputs)
        sizes, tokens, n = streams.shape[:2], one_batch(streams), self.num_cls_rows

        def fuse(position: str, flat: Tensor, **facts) -> Tensor:
            return one_batch(hook(position, flat.unflatten(0, sizes), **facts))

        if self.relative_position_bias is not None:
            bias = add_bias(bias, self.relative_position_bias(grid).to(tokens.dtype))
        normed = fuse("norm", by_role(self, "norm1", n, tokens), scales=self.norm1.weight)
        branch, _ = self.attention(normed, bias, rotary, between=partial(fuse, "attention"))
        tokens = self.add_branch("layer_scale1", fuse("branch", branch), tokens)
        tokens = self.add_branch("layer_scale2", self.mlp(by_role(self, "norm2", n, tokens)), tokens)
        return tokens.unflatten(0, sizes), hook.penalty


class VitStage(FusingStage):
    """Some consecutive blocks, and a norm of what they return."""

    def __init__(self, config: ModalityFusionConfig, vit: SpecializedViTConfig, stage: int, plan: StagePlan):
        super().__init__(config.stage_names[stage], plan)
        first = config.stage_layers[stage - 1] if stage else 0
        self.blocks = nn.ModuleList(
            VitStreamLayer(config, vit, first + index, fuses) for index, fuses in enumerate(self.own_fusions)
        )
        self.vit = vit
        for suffix in ("", "_cls") if vit.specialize_final_norm else ("",):
            norm = FlatModalityNorm(config.num_streams, vit.hidden_size, vit.layer_norm_eps)
            setattr(self, f"layernorm{suffix}", norm)

    def forward(
        self, streams: Tensor, grid: tuple[int, int], present: Tensor | None, record: FusionRecord, *inputs
    ) -> tuple[Tensor, Tensor]:
        """(streams, batch, tokens, hidden) to what the next stage reads and what this one returns, both the same."""
        streams = self.run_blocks(streams, grid, present, record, *inputs)
        streams = self.fuse_maps(streams, grid, present, record, self.vit.num_prefix_tokens)
        normed = by_role(self, "layernorm", self.vit.num_cls_rows, one_batch(streams))
        return streams, normed.unflatten(0, streams.shape[:2])


class VitStreams(ModalityStreams):
    """A plain ViT whose weights serve all modalities but for the norms, with fusions in its blocks.

    `config.stream_config` is a specialised ViT, or a vanilla one that can be converted into it: ViT, DeiT, DINOv2 (with
    registers), DINOv3, CLIP, BEiT, MAE; a timm model as the specialised ViT it was converted to. Stages end at
    `config.stage_layers` and all have the resolution of the patches. Blocks behind the last of them are left out.

    Parameters are named as in the specialised ViT; norms (norm1, norm2, CLIP's in front of the blocks, the final one,
    and their [CLS] twins) hold one row per modality and have the epsilon of the ViT itself. Every stage has a final
    norm of its own, which starts as the ViT's; where the ViT norms only the pooled token (CLIP, mean-pooled BEiT), that
    norm. Drop path follows `config.drop_path_rate`.

    Class tokens and registers travel along with the streams. A fusion in a block gets them with the patches and knows
    how many they are: one that works token by token fuses them too, with those of the other modalities, one that needs
    places or exchanges places lets them pass. A fusion of position "stage" gets the patches, before the norm of the
    stage, and the next stage reads what it returns.

    More than two modalities in two streams (`auxiliary="max"`) are merged once, in front of the first block: a ViT
    embeds its patches once.
    """

    def __init__(self, config: ModalityFusionConfig):
        super().__init__()
        self.vit = vit = vit_of_streams(config)
        config.stream_config = vit  # what is saved is read again without knowing other ViTs
        rules = {name: style for name, style in PARALLEL_LINEARS.items() if name.startswith("mlp.")}
        self._tp_plan = {f"stages.*.blocks.*.{name}": style for name, style in rules.items()}  # absent ones are dropped
        num_stages = len(config.stage_layers)
        self.channels = [vit.hidden_size] * num_stages
        self.strides = [as_pair(vit.patch_size)[0]] * num_stages
        self.smallest_image = max(as_pair(vit.patch_size))
        self.embeddings = SpecializedViTEmbeddings(vit)
        norm_size = (config.num_modalities, vit.hidden_size, vit.layer_norm_eps)
        self.pre_layernorm = ModalityNorm(*norm_size) if vit.pre_norm else None
        merged = config.num_streams < config.num_modalities
        self.auxiliary = AuxiliaryMerge(config.num_modalities - 1, vit.hidden_size) if merged else None
        shared_bias = vit.relative_position_bias == "shared"
        self.shared_relative_position_bias = RelativePositionBias(vit) if shared_bias else None
        starts = [0, *config.stage_layers]
        depths = [end - start for start, end in zip(starts, config.stage_layers, strict=False)]
        plans = plan_fusions(config, depths, self.channels)
        self.stages = nn.ModuleList(VitStage(config, vit, stage, plan) for stage, plan in enumerate(plans))
        self.set_start_values()

    def set_start_values(self) -> None:
        """As in a ViT; blocks and fusions have start values of their own."""
        for part in (self.embeddings, self.shared_relative_position_bias):
            for module in () if part is None else part.modules():
                set_vit_start_values(module, self.vit)

    def forward(
        self, pixel_values: Tensor, present: Tensor | None = None, num_stages: int | None = None
    ) -> StreamOutput:
        images, present = split_modalities(pixel_values, present)
        streams, grid, present = self.embed(images, present)
        inputs = self.block_inputs(grid, streams)
        record, maps, prefix = FusionRecord(), [], self.vit.num_prefix_tokens
        for stage in self.stages[:num_stages]:
            streams, tokens = stage(streams, grid, present, record, *inputs)
            maps.append(tokens[:, :, prefix:].transpose(2, 3).unflatten(3, grid))
        return StreamOutput(tuple(maps), tokens, present, record.penalty, record.ratios, record.fused_maps)

    def embed(self, images: Tensor, present: Tensor | None) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        """Images (modalities, batch, channels, height, width) to streams, their grid, and which of them are there."""
        tokens, grid = self.embeddings(one_batch(images))
        streams = tokens.unflatten(0, images.shape[:2])
        if self.pre_layernorm is not None:
            streams = self.pre_layernorm(streams)
        if self.auxiliary is None:
            return streams, grid, present
        prefix = self.vit.num_prefix_tokens
        patches, _, present = self.auxiliary(streams[:, :, prefix:], grid, present)
        return torch.cat([streams[:2, :, :prefix], patches], dim=2), grid, present

    def block_inputs(self, grid: tuple[int, int], like: Tensor) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """What all blocks share: a bias of attention and the tables of rotary positions."""
        bias = rotary = None
        if self.shared_relative_position_bias is not None:
            bias = self.shared_relative_position_bias(grid).to(like.dtype)
        if self.vit.position_embedding_type == "rotary":
            rotary = rotary_tables(self.vit, grid, like, self.training)
        return bias, rotary

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.patch_embeddings = value

    def load_encoder(self, encoder: PreTrainedModel) -> None:
        """Take the weights of a ViT, specialised or vanilla: shared ones as they are, each norm's for every modality.

        Blocks behind the last stage, pooler, classifier and mask token are left out.
        """
        if not isinstance(encoder, SpecializedViTTrunk):
            from vitweave.modeling.specialize import specialize  # no part of a published bundle

            encoder = specialize(encoder, SpecializedViTModel, **VANILLA)
        places, first = {}, 0
        for index, stage in enumerate(self.stages):
            for block in range(len(stage.blocks)):
                places[f"encoder.layer.{first + block}."] = [f"stages.{index}.blocks.{block}."]
            first += len(stage.blocks)
        for norm in ("layernorm.", "layernorm_cls."):
            places[norm] = [f"stages.{index}.{norm}" for index in range(len(self.stages))]
        places["encoder.shared_relative_position_bias."] = ["shared_relative_position_bias."]
        tensors = {}
        for name, tensor in encoder.state_dict().items():
            head = next((start for start in places if name.startswith(start)), None)
            if head is None and name.startswith(("embeddings.", "pre_layernorm.")) and "mask_token" not in name:
                tensors[name] = tensor
            for place in places.get(head, ()):
                tensors[place + name.removeprefix(head)] = tensor
        fill_streams(self, tensors)

"""Several aligned sensors through one encoder, fused inside its blocks: model, backbone, semantic segmentation."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, SemanticSegmenterOutput
from transformers.utils.generic import can_return_tuple

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.ensemble import ModalityEnsemble
from vitweave.modeling.heads.registry import build_segmentation_head
from vitweave.modeling.losses import SegmentationLoss
from vitweave.modeling.modality_fusion.base import ModalityFusion
from vitweave.modeling.modality_inputs import check_modalities
from vitweave.modeling.modality_streams.base import StreamOutput
from vitweave.modeling.modality_streams.present import keep_some, mean_over_present
from vitweave.modeling.modality_streams.registry import build_streams
from vitweave.modeling.pretrained import VitweavePreTrainedModel
from vitweave.modeling.vision_encoder import find_vision_model


@dataclass
class ModalityFusionOutput(BaseModelOutputWithPooling):
    """`penalty`: scalar, what the fusions ask to be added to a loss; None where they ask for nothing."""

    penalty: Tensor | None = None


@dataclass
class ModalitySegmenterOutput(SemanticSegmenterOutput):
    """
    `logits` (batch, labels, height, width): of the ensemble, at the size of the images.
    `modality_logits` (batch, streams, labels, height, width): of every stream, 0 where it is absent; None where one map
    of all streams is decoded.
    `penalty`: scalar, as in `ModalityFusionOutput`; the loss holds it with `config.penalty_weight`.
    """

    modality_logits: Tensor | None = None
    penalty: Tensor | None = None


class ModalityFusionPreTrainedModel(VitweavePreTrainedModel):
    """Initialisation, and building from a pretrained encoder, shared by the modality fusion classes."""

    config: ModalityFusionConfig
    config_class = ModalityFusionConfig
    base_model_prefix = "modality_fusion"
    built_by = "from_encoder"
    _no_split_modules = [
        *("MitStage", "SwinStage", "SwinStreamEmbeddings", "VitStage", "SpecializedViTEmbeddings"),
        "MlpHead",
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and not hasattr(module, "set_start_values"):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)

    @classmethod
    def from_encoder(cls, encoder: PreTrainedModel | str, **options) -> "ModalityFusionPreTrainedModel":
        """Let a pretrained encoder read all modalities: its norms are copied for each, what fuses is new.

        Args:
            encoder: a model (a classifier or the like gives its encoder), a folder or a Hub id.
            options: fields of `ModalityFusionConfig`: `modalities`, `fusion_type`, `num_labels`, ...
        """
        if isinstance(encoder, str):
            encoder = AutoModel.from_pretrained(encoder)
        encoder = find_vision_model(encoder)
        implementation = encoder.config._attn_implementation
        options = {"attn_implementation": implementation} | options
        model = cls(ModalityFusionConfig(stream_config=copy.deepcopy(encoder.config), **options))
        getattr(model, cls.base_model_prefix, model).streams.load_encoder(encoder)
        return model.to(device=encoder.device, dtype=encoder.dtype)

    def with_fusion(self, fusion_type: str | None, **options) -> "ModalityFusionPreTrainedModel":
        """A copy of this model with another fusion, which is new; all other weights are this model's.

        Args:
            fusion_type: as in `ModalityFusionConfig`; None for streams that do not meet.
            options: other fields of the config: `fusion_options`, `fusion_blocks`, `modality_dropout`, ...
        """
        changes = {"fusion_type": fusion_type, "fusion_options": {}, **options}
        changes |= {"attn_implementation": self.config._attn_implementation}
        model = type(self)(self.config_class(**self.config.to_dict() | changes))
        kept = {name: tensor for name, tensor in self.state_dict().items() if name not in names_of_fusions(self)}
        new = model.state_dict()
        apart = sorted(name for name in kept.keys() ^ (new.keys() - names_of_fusions(model)))
        apart += sorted(name for name in kept.keys() & new.keys() if kept[name].shape != new[name].shape)
        if apart:
            raise ValueError(
                f"expected options that change the fusion alone, but with {options} weights differ: {apart[:5]}; set"
                " them when a model is built by from_encoder"
            )
        model.load_state_dict(new | kept)
        return model.to(device=self.device, dtype=self.dtype)


def names_of_fusions(model: nn.Module) -> set[str]:
    """What the state of a model holds of its modality fusions."""
    fusions = [(name, part) for name, part in model.named_modules() if isinstance(part, ModalityFusion)]
    return {f"{name}.{key}" for name, part in fusions for key in part.state_dict()}


class ModalityFusionTrunk(ModalityFusionPreTrainedModel):
    """The streams, shared by the model and the backbone."""

    def __init__(self, config: ModalityFusionConfig):
        super().__init__(config)
        self.streams = build_streams(config)
        self.exchange_ratios: dict[str, Tensor] = {}

    def get_input_embeddings(self) -> nn.Module:
        return self.streams.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.streams.set_input_embeddings(value)

    def run_streams(self, pixel_values: Tensor, modality_mask: Tensor | None, **options) -> StreamOutput:
        """Check the images, leave modalities out in training, and encode the rest.

        What was exchanged stays in `exchange_ratios` for logging: "stage1.block0" -> (streams,).

        Args:
            pixel_values: (batch, modalities, channels, height, width).
            modality_mask: (batch, modalities), 1 or True where the sensor is there; None where all are.
        """
        pixel_values, present = check_modalities(pixel_values, modality_mask, self.config)
        if self.training and self.config.modality_dropout > 0:
            if present is None:
                present = torch.ones(pixel_values.shape[:2], dtype=torch.bool, device=pixel_values.device)
            present = keep_some(present, self.config.modality_dropout)
        output = self.streams(pixel_values, present, **options)
        if not torch.compiler.is_compiling():
            self.exchange_ratios = output.exchange_ratios
        return output

    def states_asked_for(self, output: StreamOutput, asked: bool | None) -> tuple[Tensor, ...] | None:
        """The maps of every stage, (batch, streams, channels_k, height_k, width_k), where hidden states are wanted."""
        asked = self.config.output_hidden_states if asked is None else asked
        return tuple(stage_map.transpose(0, 1) for stage_map in output.maps) if asked else None


class ModalityFusionModel(ModalityFusionTrunk):
    """The encoder of all modalities as one sequence: the mean of the streams that are present."""

    def __init__(self, config: ModalityFusionConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        modality_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> ModalityFusionOutput:
        """Encode aligned images.

        Args:
            pixel_values: (batch, modalities, channels, height, width).
            modality_mask: (batch, modalities), 1 or True where the sensor is there, whose pixels are not read where it
                is not; None where all are there.

        Returns:
            last_hidden_state (batch, tokens, hidden), the mean over the present streams of the last stage, or the one
            map that a fusion makes of them;
            pooler_output (batch, hidden), the mean of its patches; on request hidden_states, the maps of every stage
            (batch, streams, channels_k, height_k, width_k).
        """
        output = self.run_streams(pixel_values, modality_mask)
        tokens = mean_over_present(output.tokens, output.present)
        patches = output.maps[-1].shape[-2] * output.maps[-1].shape[-1]
        if output.fused is not None:
            fused = output.fused[-1].flatten(2).transpose(1, 2)
            tokens = torch.cat([tokens[:, : tokens.shape[1] - patches], fused], dim=1)
        return ModalityFusionOutput(
            last_hidden_state=tokens,
            pooler_output=tokens[:, tokens.shape[1] - patches :].mean(dim=1),
            hidden_states=self.states_asked_for(output, output_hidden_states),
            penalty=output.penalty,
        )


class ModalityFusionBackbone(BackboneMixin, ModalityFusionTrunk):
    """The maps of the stages in `out_features`, for any head that takes a backbone.

    Runs no stage beyond the deepest one asked for. `config.merge` says how the streams become one map: their "mean", or
    "concat", all of them as channels, with zeros where one is absent. A fusion that makes one map of them
    (`rectify_fuse` with `fuse="map"`) decides that itself.

    Heads that read the size of the images off axis 2, as transformers' do, want the modalities' images side by side:
    (batch, modalities * channels, height, width).
    """

    has_attentions = False
    reads_modalities = True  # it checks the images itself

    def __init__(self, config: ModalityFusionConfig):
        super().__init__(config)
        times = config.num_streams if config.merge == "concat" and not self.streams.makes_map else 1
        self.stage_names, self.num_features = config.stage_names, [times * width for width in self.streams.channels]
        self.post_init()

    def post_init(self):
        ModalityFusionTrunk.post_init(self)  # BackboneMixin's would put hooks into the blocks

    def merged(self, output: StreamOutput, index: int) -> Tensor:
        """The map of a stage, (batch, channels', height, width)."""
        if output.fused is not None:
            return output.fused[index]
        stage_map, present = output.maps[index], output.present
        if self.config.merge == "mean":
            return mean_over_present(stage_map, present)
        if present is not None:
            stage_map = stage_map.masked_fill(~present[..., None, None, None], 0)
        return stage_map.transpose(0, 1).flatten(1, 2)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        modality_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BackboneOutput:
        """Encode aligned images as `ModalityFusionModel` does.

        Returns:
            feature_maps, one per out feature: (batch, channels_k, height_k, width_k).
        """
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wanted = [self.stage_names.index(name) for name in self.out_features]
        output = self.run_streams(pixel_values, modality_mask, num_stages=None if asked else max(wanted) + 1)
        return BackboneOutput(
            feature_maps=tuple(self.merged(output, index) for index in wanted),
            hidden_states=self.states_asked_for(output, asked),
        )


class ModalityFusionForSemanticSegmentation(ModalityFusionPreTrainedModel):
    """One MLP decoder for all streams, and the ensemble of their logits.

    Where the fusion makes one map of all streams (CMX: `rectify_fuse` with `fuse="map"`), that is all it decodes.

    The loss is the sum of `config.losses` (cross-entropy) over the logits of every stream and of the ensemble, plus
    `config.penalty_weight` times what the fusions ask for. Where a stream is absent it has no loss.

    The decoder's batch norm sees all streams as one batch in training, absent ones left out; GeminiFusion's and
    TokenFusion's code decodes one stream after the other, so that each has statistics of its own there. Their recipes
    for NYUDv2 and SUN RGB-D keep the norm frozen instead: `config.decoder_frozen_norm`.
    """

    def __init__(self, config: ModalityFusionConfig):
        super().__init__(config)
        self.modality_fusion = ModalityFusionModel(config)
        options = {
            "hidden_size": config.decoder_hidden_size,
            "dropout": config.decoder_dropout,
            "drop_channels": True,
            "frozen_norm": config.decoder_frozen_norm,
            **(config.decoder_options or {}),
        }
        self.decoder = build_segmentation_head("mlp", self.modality_fusion.streams.channels, config.num_labels, options)
        num_decoded = 1 if self.modality_fusion.streams.makes_map else config.num_streams
        self.ensemble = ModalityEnsemble(num_decoded, trained=config.ensemble == "trained")
        losses = {"cross_entropy": 1.0} if config.losses is None else config.losses
        self.criterion = SegmentationLoss(
            config.num_labels, losses, config.loss_options, config.class_weights, config.semantic_loss_ignore_index
        )
        self.post_init()

    @property
    def exchange_ratios(self) -> dict[str, Tensor]:
        """What the last forward exchanged: "stage1.block0" -> (streams,), the part of the tokens or channels."""
        return self.modality_fusion.exchange_ratios

    def decode(self, output: StreamOutput) -> Tensor:
        """Logits (streams, batch, labels, height, width) at the size of the first stage; 0 where a stream is absent.

        Of one map of all streams (1, batch, labels, height, width).
        """
        if output.fused is not None:
            return self.decoder(list(output.fused))[None]
        valid = None if output.present is None else output.present.flatten()
        logits = self.decoder([stage_map.flatten(0, 1) for stage_map in output.maps], valid)
        if valid is not None:
            logits = logits.masked_fill(~valid.view(-1, 1, 1, 1), 0)
        return logits.unflatten(0, output.maps[0].shape[:2])

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        modality_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> ModalitySegmenterOutput:
        """Score every pixel.

        Args:
            pixel_values: (batch, modalities, channels, height, width).
            modality_mask: (batch, modalities), 1 or True where the sensor is there, whose pixels are not read where it
                is not; None where all are there.
            labels: (batch, height, width) class ids, `config.semantic_loss_ignore_index` where no class is known.
        """
        output = self.modality_fusion.run_streams(pixel_values, modality_mask)
        logits = self.decode(output)
        streams, present = logits.shape[0], None if output.fused is not None else output.present
        if streams > 1:
            logits = torch.cat([logits, self.ensemble(logits, present)[None]])
        size = pixel_values.shape[-2:]
        logits = F.interpolate(logits.flatten(0, 1), size=size, mode="bilinear", align_corners=False)
        logits = logits.unflatten(0, (-1, pixel_values.shape[0]))  # (streams, the ensemble, batch, labels, ...)
        loss = None if labels is None else self.loss(logits, labels, present, output.penalty)
        return ModalitySegmenterOutput(
            loss=loss,
            logits=logits[-1],
            modality_logits=None if output.fused is not None else logits[:streams].transpose(0, 1),
            hidden_states=self.modality_fusion.states_asked_for(output, output_hidden_states),
            penalty=output.penalty,
        )

    def loss(self, logits: Tensor, labels: Tensor, present: Tensor | None, penalty: Tensor | None) -> Tensor:
        """The sum over all logits (streams, then the ensemble, batch, labels, height, width), and the penalty."""
        terms = []
        for index, scores in enumerate(logits.unbind()):  # indexing would have zeros of the whole made for each
            seen = labels
            if present is not None and index < present.shape[0]:
                seen = labels.masked_fill(~present[index, :, None, None], self.config.semantic_loss_ignore_index)
            terms.append(self.criterion(scores, seen))
        if penalty is not None:
            terms.append(self.config.penalty_weight * penalty)
        return sum(terms[1:], start=terms[0])

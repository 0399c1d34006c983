"""Depth per pixel: any registered backbone under a depth head."""

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import DepthEstimatorOutput
from transformers.utils.generic import can_return_tuple

from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.modeling.class_tokens import check_class_tokens
from vitweave.modeling.depth_losses import DepthLoss, check_depth_labels
from vitweave.modeling.heads.registry import build_depth_head
from vitweave.modeling.modeling_dense_predictor import DensePredictorPreTrainedModel, EncoderOutputs


class DensePredictorForDepthEstimation(DensePredictorPreTrainedModel):
    """Depth estimation: one value per pixel of the input, in metres or as relative inverse depth.

    The head reads the maps of `backbone.out_features`, and some heads the class token of each of those layers; its
    values are upsampled bilinearly to the input's size, and to the labels' for the losses. DINOv2's depth heads read
    features without the final norm: `apply_layernorm=False` in the backbone's config.
    """

    def __init__(self, config: DensePredictorConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config, backbone)
        value_range = {name: getattr(config, name) for name in ("depth_target", "min_depth", "max_depth")}
        self.head = build_depth_head(
            config.head_type, list(self.backbone.channels), **value_range, options=config.head_options
        )
        if self.head.reads_class_tokens:
            option = "readout='ignore'" if config.head_type == "dpt" else "use_cls_token=False"
            check_class_tokens(self.backbone, f"pass {option} among the head's options, or take such a backbone")
        self.criterion = DepthLoss(config.losses, config.loss_options, **value_range)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: EncoderOutputs | None = None,
        **kwargs,
    ) -> DepthEstimatorOutput:
        """Estimate the depth of every pixel.

        Args:
            pixel_values: (batch, channels, height, width).
            labels: (batch, height, width) in metres, of any size; not positive or not finite where nothing is measured.
            encoder_outputs: instead of pixel_values, what `encode` returned for them. The depth takes the size of the
                labels then, and without labels the head's own.
            kwargs: go to the backbone, e.g. `output_hidden_states`.

        Returns:
            predicted_depth (batch, height, width), in metres within [min_depth, max_depth] or with
            `depth_target="disparity"` as relative inverse depth, and with labels the loss.
        """
        read, outputs = self.read(pixel_values, encoder_outputs, **kwargs)
        values = self.head(list(read["feature_maps"]), read.get("class_tokens"))  # (batch, 1, height_0, width_0)
        shown = labels if pixel_values is None else pixel_values
        predicted = values if shown is None else self.at_size(values, shown)
        loss = None
        if labels is not None:
            check_depth_labels(labels, values.shape[0])
            loss = self.criterion(self.at_size(values, labels), labels)
        return DepthEstimatorOutput(
            loss=loss,
            predicted_depth=predicted[:, 0],
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def at_size(self, values: Tensor, like: Tensor) -> Tensor:
        """Values (batch, 1, any height, any width) upsampled to the last two axes of `like`, and kept in range."""
        values = F.interpolate(values, size=like.shape[-2:], mode="bilinear", align_corners=False)
        if self.config.depth_target == "metres":  # interpolation may round beyond the ends
            values = values.clamp(self.config.min_depth, self.config.max_depth)
        return values

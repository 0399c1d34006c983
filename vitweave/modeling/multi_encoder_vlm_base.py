"""What the vision-language model and its head share: freezing, and what the feature cache needs."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from vitweave.configuration.configuration_multi_encoder_vlm import MultiEncoderVlmConfig
from vitweave.modeling.modeling_multi_encoder import EncodedByAll
from vitweave.modeling.pretrained import VitweavePreTrainedModel


class MultiEncoderVlmPreTrainedModel(VitweavePreTrainedModel):
    """Freezing, and what the feature cache needs, shared by the vision-language classes."""

    config: MultiEncoderVlmConfig
    config_class = MultiEncoderVlmConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _skip_keys_device_placement = ["past_key_values"]

    @property
    def core(self) -> PreTrainedModel:
        """The model without its head."""
        return getattr(self, self.base_model_prefix, self)

    def freeze(self) -> None:
        """Take the parts that the config says to keep out of training."""
        core = self.core
        core.vision_tower.freeze()
        if self.config.freeze_vision_encoders:
            core.vision_encoder.requires_grad_(False)
        if self.config.freeze_language_model:
            core.language_model.requires_grad_(False)
            if core is not self:
                self.lm_head.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        core = self.core
        parts = [*core.vision_tower.encoders]
        if not any(getattr(module, "gradient_checkpointing", False) for module in core.language_model.modules()):
            parts.append(core.language_model)  # checkpointing acts only in training mode
        for part in parts:
            if not any(weight.requires_grad for weight in part.parameters()):
                part.eval()
        return self

    @property
    def vision_encoder(self) -> nn.Module:
        """All encoders below the fusion."""
        return self.core.vision_tower.vision_encoder

    @property
    def encode_options(self) -> dict:
        """What `encode` depends on besides the encoders."""
        return self.core.vision_tower.encode_options

    def encode(self, pixel_values: Tensor) -> EncodedByAll:
        """What the fusion reads of tiles (tiles, channels, height, width), for `forward(encoder_outputs=...)`."""
        return self.core.vision_tower.encode(pixel_values)

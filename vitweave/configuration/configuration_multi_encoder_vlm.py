"""Config of a vision-language model over a tower of vision encoders."""

import re

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from vitweave.configuration.configuration_base import VitweaveConfig
from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.encoder_configs import resolve_config
from vitweave.configuration.encoder_facts import vision_part
from vitweave.configuration.image_tokens import check_token_layout, count_image_tokens

PROJECTORS = r"identity|linear|mlp\d+x_gelu|norm_mlp|residual|se_mlp"
SAME_WIDTH = ("identity", "residual")  # projectors that cannot change the number of channels
SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # what some heads do after the Linear


@strict
class MultiEncoderVlmConfig(VitweaveConfig):
    """A tower of vision encoders, a projector, and a language model that reads the tower's tokens between its own.

    Args:
        vision_config: a `MultiEncoderConfig`; any other vision encoder becomes the only one of such a tower.
        text_config: any causal language model of transformers; None is Llama's.
        projector_type: see `vitweave/modeling/projectors.py`.
        projector_options: arguments of that projector's constructor.
        image_token_id: the placeholder, repeated as often as an image has tokens; it needs an embedding like any token.
        image_newline: a learned vector ends each row of the tower's grid (Cambrian-1, arXiv:2406.16860).
        unpad: images are padded to squares, and the tokens of the padding are left out (Cambrian-1). Fusions that can
            mask the padding do so.
        freeze_vision_encoders: train without the encoders of the tower; their weights, dropout and statistics stand
            still, while the fusion trains. (`encoder_options` of the tower freeze single ones.)
        freeze_language_model: train without the language model and its head.
        tie_word_embeddings: the head shares the weights of the embeddings; None is what `text_config` says.
    """

    model_type = "multi_encoder_vlm"
    keys_to_ignore_at_inference = ["past_key_values", "hidden_states", "attentions", "image_hidden_states"]
    sub_configs = {
        "vision_config": AutoConfig,
        "text_config": AutoConfig,
    }  # the form that works from 5.13 to the newest

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projector_type: str = "mlp2x_gelu"
    projector_options: dict | None = None
    image_token_id: int = 0
    image_newline: bool = False
    unpad: bool = False
    freeze_vision_encoders: bool = False
    freeze_language_model: bool = False
    tie_word_embeddings: bool | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **extra):
        vision = resolve_config(
            self.vision_config or {"model_type": "multi_encoder_vision"}, "vision_config", self.transformers_version
        )
        if vision.model_type != MultiEncoderConfig.model_type:
            vision = tower_of_one(vision_part(vision))
        self.vision_config = vision
        text = resolve_config(self.text_config or {"model_type": "llama"}, role="text_config")
        self.text_config = getattr(text, "text_config", text)  # of a multimodal model the language model
        self.check_text_config()
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**extra)

    def check_text_config(self):
        """Refuse what is no causal language model, and heads that do more than one Linear."""
        text = self.text_config
        if text.is_encoder_decoder or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(
                f"expected a text_config of a causal language model (one that AutoModelForCausalLM opens), got the"
                f" model_type {text.model_type!r}"
            )
        scaled = [name for name in SCALED_LOGITS if getattr(text, name, None) not in (None, 1)]
        if scaled:
            raise ValueError(
                f"the language model {text.model_type!r} changes its logits after the last Linear ({scaled}), which"
                " this model does not; set them to None, or take another language model"
            )

    def validate_image_tokens(self):
        """Refuse a placeholder without embedding, and layouts of tokens that the tower does not have."""
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"expected image_token_id below the language model's vocab_size {self.text_config.vocab_size}, got"
                f" {self.image_token_id}"
            )
        tower = self.vision_config
        check_token_layout(tower.num_tokens, tower.fused_grid, self.image_newline, self.unpad)

    def validate_projector(self):
        """Refuse an unknown projector, and one that keeps the number of channels where that has to change."""
        if not re.fullmatch(PROJECTORS, self.projector_type):
            raise ValueError(f"unknown projector_type {self.projector_type!r}; known: {PROJECTORS.split('|')}")
        width, wanted = self.vision_config.fused_size, self.text_config.hidden_size
        if self.projector_type in SAME_WIDTH and width != wanted:
            raise ValueError(
                f"expected {wanted} channels of the tower, as the language model has, with"
                f" projector_type={self.projector_type!r}, got {width}: take 'linear' or 'mlp2x_gelu'"
            )

    @property
    def image_seq_length(self) -> int:
        """Tokens of a tile of the tower's `image_size`; with `unpad` that is a square image, which has the most."""
        return count_image_tokens(self, image_size=(1, 1))


def tower_of_one(encoder: PreTrainedConfig) -> MultiEncoderConfig:
    """A tower whose tokens are those of one encoder, at the size the encoder is made for."""
    size = getattr(encoder, "image_size", None) or 224
    return MultiEncoderConfig(encoder_configs=[encoder], image_size=size, fusion_type="channel_concat")

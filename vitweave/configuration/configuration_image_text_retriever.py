"""Config of the dual encoder that finds images by their text and texts by their image."""

import math

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from vitweave.configuration.configuration_base import VitweaveConfig
from vitweave.configuration.encoder_configs import resolve_config
from vitweave.configuration.encoder_facts import vision_part

CHOICES = {
    "contrastive_loss": ("infonce", "siglip"),
    "duplicate_captions": ("mask", "positives"),
    "text_pooling": ("mean", "pooler", "first", "last"),
    "tile_source": ("patches", "maps"),
}


@strict
class ImageTextRetrieverConfig(VitweaveConfig):
    """A vision encoder and a text encoder whose embeddings share one space.

    Args:
        vision_config: any vision encoder, a layer fusion among them; None is a specialised ViT of base size.
        text_config: any text encoder of transformers; None is BERT of base size.
        freeze_vision_encoder, freeze_text_model: train without this part; its weights, dropout and statistics stand
            still. Of a layer fusion the encoder is frozen and the fusion trains. Both are saved.
        projection_dim: channels of the shared space.
        text_pooling: how the text model's tokens become one vector: "mean" of the valid ones, its own "pooler" output,
            the "first" or the "last" valid token.
        contrastive_loss: "infonce" (CLIP, arXiv:2103.00020) or "siglip" (arXiv:2303.15343).
        duplicate_captions: what pairs of an image with an equal caption of another image are: left out of the loss
            ("mask"), or "positives" too.
        logit_scale_init: start of the logarithm of the factor on cosines; None is ln(1 / 0.07) = 2.6592 for "infonce",
            ln 10 for "siglip". The factor never exceeds 100.
        logit_bias_init: start of the bias on the scaled cosines; "siglip" only.
        local_loss_weight: weight of the tile <-> sentence alignment in the loss; 0 builds a model without it.
        local_temperature: of the soft maximum over tiles; 0 is the hard maximum.
        tile_levels: numbers T of the T x T tiles of each level.
        tile_source: "patches" cuts all levels from the patch grid; "maps" cuts one level from each feature map of the
            layer fusion (its `fpn`), in that order.
        ranking_alpha: weight of the global cosine in the ranking score, the local score has the rest.
    """

    model_type = "image_text_retriever"
    sub_configs = {
        "vision_config": AutoConfig,
        "text_config": AutoConfig,
    }  # the form that works from 5.13 to the newest

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    freeze_vision_encoder: bool = False
    freeze_text_model: bool = False
    projection_dim: int = 256
    text_pooling: str = "mean"
    contrastive_loss: str = "infonce"
    duplicate_captions: str = "mask"
    logit_scale_init: float | int | None = None
    logit_bias_init: float | int = -10.0
    local_loss_weight: float | int = 0.0
    local_temperature: float | int = 0.05
    tile_levels: list[int] | tuple[int, ...] = (1, 2, 4)
    tile_source: str = "patches"
    ranking_alpha: float | int = 0.5
    initializer_range: float = 0.02

    def __post_init__(self, **extra):
        vision = resolve_config(
            self.vision_config or {"model_type": "specialized_vit"}, "vision_config", self.transformers_version
        )
        self.vision_config = vision_part(vision)
        text = resolve_config(self.text_config or {"model_type": "bert"}, role="text_config")
        self.text_config = getattr(text, "text_config", text)  # of CLIP, SigLIP ... the text part
        self.tile_levels = list(self.tile_levels)
        if self.logit_scale_init is None:
            self.logit_scale_init = math.log(10) if self.contrastive_loss == "siglip" else 2.6592
        super().__post_init__(**extra)

    def validate_options(self):
        """Refuse unknown choices and numbers out of range."""
        for option, known in CHOICES.items():
            if getattr(self, option) not in known:
                raise ValueError(f"expected {option} to be one of {list(known)}, got {getattr(self, option)!r}")
        if not self.tile_levels or min(self.tile_levels) < 1:
            raise ValueError(f"expected tile_levels such as [1, 2, 4], got {self.tile_levels}")
        if self.local_loss_weight < 0 or self.local_temperature < 0:
            raise ValueError(
                "expected local_loss_weight and local_temperature of 0 or more, got"
                f" {self.local_loss_weight} and {self.local_temperature}"
            )
        if not 0 <= self.ranking_alpha <= 1:
            raise ValueError(f"expected ranking_alpha in 0..1, got {self.ranking_alpha}")

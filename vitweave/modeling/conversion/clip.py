"""The vision tower of CLIP (arXiv:2103.00020): a norm before block 0, the final norm on the class token only."""

from transformers import PreTrainedModel

from vitweave.modeling.conversion.host_family import SHAPE_FACTS, HostFamily, take


def clip_options(model: PreTrainedModel) -> dict:
    """Facts of a CLIP vision tower, given alone or inside of a model with both towers."""
    config = getattr(model.config, "vision_config", model.config)
    return {
        **take(config, *SHAPE_FACTS, "intermediate_size"),
        "attention_probs_dropout_prob": config.attention_dropout,
        "layerscale_value": None,
        "use_mask_token": False,
        "patch_bias": False,
        "pre_norm": True,
        "final_norm": "pooled",
        "classifier_input": "mean",
        "apply_layernorm": False,
    }


CLIP = HostFamily(
    options=clip_options,
    renames=(
        (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
        (r"^embeddings\.position_embedding\.weight$", "embeddings.position_embeddings"),
        (r"^embeddings\.patch_embedding\.weight$", "embeddings.patch_embeddings.projection.weight"),
        (r"^pre_layrnorm\.", "pre_layernorm."),
        (r"^post_layernorm\.", "layernorm."),
        (r"^encoder\.layers\.", "encoder.layer."),
        (r"\.self_attn\.out_proj\.", ".attention.o_proj."),
        (r"\.self_attn\.", ".attention."),
        (r"\.layer_norm([12])\.", r".norm\1."),
    ),
    prefixes=("vision_model.",),
    base_class="CLIPVisionModel",
    classifiers={"mean": "CLIPForImageClassification"},
)

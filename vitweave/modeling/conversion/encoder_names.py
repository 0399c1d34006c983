"""Names of the encoders inside of released multi-encoder models, and those of transformers' models."""

from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.modeling.conversion.eva02_det import EVA02_DET_DROPPED, EVA02_DET_NAMES
from vitweave.modeling.conversion.release import TensorNames

# CLIP and SigLIP as older transformers had them: everything inside of `vision_model`
CLIP = TensorNames(
    renames=((r"^vision_model\.", ""),),
    dropped=((r"(vision_model\.)?embeddings\.position_ids", "numbers of the rows of the position table, a constant"),),
)
# The layer scale of timm's ConvNeXt is `gamma`. Older transformers wrote every `gamma` of a file as `weight`, and
# checkpoints that were saved through them have that name.
TIMM_DROPPED = ((r"head\.fc\..*", "classifier of the pretraining"),)
CONVNEXT = TensorNames(
    renames=(
        (r"^vision_(stem|stages)\.", r"\1."),  # Mini-Gemini's copy of the trunk
        (r"^stem\.0\.", "embeddings.patch_embeddings."),
        (r"^stem\.1\.", "embeddings.layernorm."),
        (r"^stages\.", "encoder.stages."),
        (r"\.downsample\.", ".downsampling_layer."),
        (r"\.blocks\.(\d+)\.(gamma|weight)$", r".layers.\1.layer_scale_parameter"),
        (r"\.blocks\.(\d+)\.conv_dw\.", r".layers.\1.dwconv."),
        (r"\.blocks\.(\d+)\.norm\.", r".layers.\1.layernorm."),
        (r"\.blocks\.(\d+)\.mlp\.fc([12])\.", r".layers.\1.pwconv\2."),
        (r"^head\.norm\.", "layernorm."),
    ),
    dropped=TIMM_DROPPED,
    optional=(r"layernorm\.(weight|bias)",),  # of the pooled output
)
TIMM_CONVNEXT = TensorNames(
    renames=(
        (r"^vision_(stem|stages)\.", r"\1."),
        (r"\.blocks\.(\d+)\.weight$", r".blocks.\1.gamma"),
        (r"^", "timm_model."),
    ),
    dropped=TIMM_DROPPED,
    optional=(r"timm_model\.head\.norm\.(weight|bias)",),
)
SAM = TensorNames(renames=((r"^", "vision_encoder."),))
SAM_SHORT_NECK = TensorNames(SAM.renames, optional=(r"vision_encoder\.neck\.(conv2|layer_norm2)\.(weight|bias)",))
INTERN_VIT = TensorNames(
    renames=(
        (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
        (r"^embeddings\.position_embedding$", "embeddings.position_embeddings"),
        (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
        (r"^encoder\.layers\.", "encoder.layer."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.ls([12])$", r".lambda_\1"),
        (r"\.attn\.qkv\.", ".attention.{q_proj,k_proj,v_proj}."),
        (r"\.attn\.proj\.", ".attention.projection_layer."),
        (r"\.attn\.", ".attention."),
    )
)

ENCODER_NAMES: dict[str, TensorNames] = {
    "clip_vision_model": CLIP,
    "convnext": CONVNEXT,
    "dinov2": TensorNames(),
    "eva02_det_vit": TensorNames(EVA02_DET_NAMES, EVA02_DET_DROPPED),
    "internvl_vision": INTERN_VIT,
    "pix2struct_vision_model": TensorNames(),
    "sam_vision_model": SAM,
    "siglip_vision_model": CLIP,
    "timm_wrapper": TIMM_CONVNEXT,
}


def encoder_names(config: MultiEncoderConfig, index: int) -> TensorNames:
    """The names of encoder `index` of a tower; of SAM, without the second half of its neck where that is not read."""
    model_type = config.encoder_configs[index].model_type
    if model_type not in ENCODER_NAMES:
        raise ValueError(
            f"the config has an encoder of the type {model_type!r}, which no release has; known:"
            f" {sorted(ENCODER_NAMES)}"
        )
    if model_type == "sam_vision_model" and -1 not in config.options[index].layers:
        return SAM_SHORT_NECK
    return ENCODER_NAMES[model_type]

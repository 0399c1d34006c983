"""ViT (arXiv:2010.11929) and the encoder of MAE (arXiv:2111.06377)."""

from transformers import PreTrainedModel

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.conversion.host_family import (
    DROPOUT_FACTS,
    SHAPE_FACTS,
    HostFamily,
    has_parameter,
    qkv_biases,
    take,
)

RENAMES = (
    (r"^layers\.", "encoder.layer."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)


def vit_options(model: PreTrainedModel) -> dict:
    """Facts of a ViT or DeiT; whether there is a pooler or a mask token is not in its config."""
    config = model.config
    use_pooler = has_parameter(model, "pooler.dense.weight")
    return {
        **take(config, *SHAPE_FACTS, *DROPOUT_FACTS, "intermediate_size"),
        **qkv_biases(config),
        "layerscale_value": None,
        "use_mask_token": has_parameter(model, "embeddings.mask_token"),
        "use_pooler": use_pooler,
        **(take(config, "pooler_act", "pooler_output_size") if use_pooler else {}),
    }


def mae_options(model: PreTrainedModel) -> dict:
    """The encoder without masking: every patch is seen. Its sine-cosine positions stay frozen, as in the host."""
    config = model.config
    return {
        **take(config, *SHAPE_FACTS, *DROPOUT_FACTS, "intermediate_size"),
        **qkv_biases(config),
        "layerscale_value": None,
        "use_mask_token": False,
        "freeze_position_embeddings": True,
    }


def vit_arguments(config: SpecializedViTConfig) -> dict:
    """Constructor arguments of the base class of ViT and DeiT."""
    return {"add_pooling_layer": config.use_pooler, "use_mask_token": config.use_mask_token}


VIT = HostFamily(
    options=vit_options,
    renames=RENAMES,
    prefixes=("vit.",),
    base_class="ViTModel",
    classifiers={"cls": "ViTForImageClassification"},
    base_arguments=vit_arguments,
)
VIT_MAE = HostFamily(options=mae_options, renames=RENAMES, prefixes=("vit.",), base_class="ViTMAEModel")

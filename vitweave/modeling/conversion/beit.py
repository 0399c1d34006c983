"""BEiT (arXiv:2106.08254): relative position bias, LayerScale as raw parameters, no key bias."""

from transformers import PreTrainedModel

from vitweave.modeling.conversion.host_family import DROPOUT_FACTS, SHAPE_FACTS, HostFamily, take


def beit_options(model: PreTrainedModel) -> dict:
    """Facts of a BEiT; mean-pooled ones norm the pooled vector only."""
    config = model.config
    if config.use_relative_position_bias and config.use_shared_relative_position_bias:
        raise ValueError(
            "this BEiT has relative position biases per layer and a shared one; the specialised ViT holds one of them"
        )
    bias = "per_layer" if config.use_relative_position_bias else None
    return {
        **take(config, *SHAPE_FACTS, *DROPOUT_FACTS, "intermediate_size", "use_mask_token", "drop_path_rate"),
        "drop_path_decay": "linear",
        "key_bias": False,
        "layerscale_value": config.layer_scale_init_value if config.layer_scale_init_value > 0 else None,
        "position_embedding_type": "learned" if config.use_absolute_position_embeddings else "none",
        "relative_position_bias": "shared" if config.use_shared_relative_position_bias else bias,
        "final_norm": "pooled" if config.use_mean_pooling else "tokens",
        "pooling": "mean" if config.use_mean_pooling else "cls",
        "classifier_input": "pooled",
        "apply_layernorm": False,  # as the host's backbone
        "reshape_hidden_states": config.reshape_hidden_states,
    }


BEIT = HostFamily(
    options=beit_options,
    renames=(
        (r"^layers\.", "encoder.layer."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.lambda_([12])$", r".layer_scale\1.lambda1"),
        (r"^shared_position_bias\.", "encoder.shared_relative_position_bias."),
        (r"^pooler\.layernorm\.", "layernorm."),
    ),
    prefixes=("beit.",),
    base_class="BeitModel",
    classifiers={"pooled": "BeitForImageClassification"},
    backbones=("BeitBackbone",),
)

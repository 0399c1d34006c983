"""DINOv2 (arXiv:2304.07193), without and with registers (arXiv:2309.16588)."""

from transformers import PreTrainedModel

from vitweave.modeling.conversion.host_family import (
    DROPOUT_FACTS,
    SHAPE_FACTS,
    HostFamily,
    has_parameter,
    qkv_biases,
    take,
)

RENAMES = (  # names of transformers before 5.19; the newer ones are ours
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.mlp\.weights_in\.(\w+)$", r".mlp.{gate_proj,up_proj}.\1"),
    (r"\.mlp\.weights_out\.", ".mlp.down_proj."),
)


def dinov2_options(model: PreTrainedModel) -> dict:
    """Facts of either DINOv2; with registers the position table is resampled with antialiasing."""
    config = model.config
    registers = getattr(config, "num_register_tokens", 0)
    return {
        **take(config, *SHAPE_FACTS, *DROPOUT_FACTS, "mlp_ratio", "layerscale_value", "use_swiglu_ffn"),
        **take(config, "drop_path_rate", "apply_layernorm", "reshape_hidden_states"),
        **qkv_biases(config),
        "hidden_act": "silu" if config.use_swiglu_ffn else config.hidden_act,
        "use_mask_token": has_parameter(model, "embeddings.mask_token"),
        "num_register_tokens": registers,
        "position_interpolation": "bicubic_antialias" if config.model_type == "dinov2_with_registers" else "bicubic",
        "classifier_input": "cls_mean",
    }


DINOV2 = HostFamily(
    options=dinov2_options,
    renames=RENAMES,
    prefixes=("dinov2.",),
    base_class="Dinov2Model",
    classifiers={"cls_mean": "Dinov2ForImageClassification"},
    backbones=("Dinov2Backbone",),
)
DINOV2_WITH_REGISTERS = HostFamily(
    options=dinov2_options,
    renames=RENAMES,
    prefixes=("dinov2_with_registers.",),
    base_class="Dinov2WithRegistersModel",
    classifiers={"cls_mean": "Dinov2WithRegistersForImageClassification"},
    backbones=("Dinov2WithRegistersBackbone",),
)

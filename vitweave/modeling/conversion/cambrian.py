"""Cambrian-1 (arXiv:2406.16860) as cambrian-mllm/cambrian stores it: the connector, without the frozen encoders."""

from torch import Tensor

from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.modeling.conversion.encoder_names import encoder_names
from vitweave.modeling.conversion.language_models import llama_parts
from vitweave.modeling.conversion.release import TOWER, Part, Release, TensorNames, encoder_parts, projector_part

PROJECTION = TensorNames(
    renames=((r"^(\d+)\.0\.", r"\1.fc1."), (r"^(\d+)\.2\.", r"\1.fc2."), (r"^(\d+)\.3\.", r"\1.norm."))
)
SAMPLER = TensorNames(
    renames=(
        (r"\.cross_attn\.q_proj\.0\.", ".attention.q_norm."),
        (r"\.cross_attn\.q_proj\.1\.", ".attention.q_proj."),
        (r"\.cross_attn\.([kv])_proj_(\d+)\.0\.", r".attention.readers.\2.\1_norm."),
        (r"\.cross_attn\.([kv])_proj_(\d+)\.1\.", r".attention.readers.\2.\1_proj."),
        (r"\.cross_attn\.o_proj\.", ".attention.o_proj."),
        (r"\.aggregate_(\d+)\.attention_layer\.linear_(\d)\.", r".readers.\1.fc\2."),
        (r"\.aggregate_(\d+)\.attention_layer\.q_proj\.0\.", r".readers.\1.q_norm."),
        (r"\.aggregate_(\d+)\.attention_layer\.q_proj\.1\.", r".readers.\1.q_proj."),
        (r"\.aggregate_(\d+)\.attention_layer\.([kv])_proj\.0\.", r".readers.\1.readers.0.\2_norm."),
        (r"\.aggregate_(\d+)\.attention_layer\.([kv])_proj\.1\.", r".readers.\1.readers.0.\2_proj."),
        (r"\.aggregate_(\d+)\.attention_layer\.o_proj\.", r".readers.\1.o_proj."),
        (r"\.(weight_mlp|proj_out)\.linear_(\d)\.", r".\1.fc\2."),
    )
)
INSIDE_LANGUAGE_MODEL = (
    "sampler between the layers of the language model, which this model does not run: the released language model was"
    " trained with it"
)


def parts(config: MultiEncoderConfig) -> list[Part]:
    """The queries, the projection of each encoder, the samplers, the projector and the newline."""
    towers = [f"model.vision_tower_aux_list.{index}.vision_tower." for index in range(len(config.encoder_configs))]
    return [
        *encoder_parts(config, towers, encoder_names),
        Part("model.vision_query", f"{TOWER}fusion.query"),
        Part("model.mm_projector_aux_", f"{TOWER}fusion.projections.", PROJECTION),
        Part("model.vision_sampler_", f"{TOWER}fusion.samplers.", SAMPLER),
        Part("model.vision_sampler_layers.", None, reason=INSIDE_LANGUAGE_MODEL),
        Part("model.image_newline", "model.image_newline.weight"),
        projector_part("model.mm_projector."),
    ]


def sizes(config: MultiEncoderConfig, tensors: dict[str, Tensor]) -> dict:
    """Width, number of layers and of query groups of the connector."""
    if "fusion.query" not in tensors:
        return {}
    groups, width = tensors["fusion.query"].shape
    numbers = {int(name.split(".")[4]) for name in tensors if name.startswith("fusion.samplers.0.layers.")}
    options = {**(config.fusion_options or {}), "vision_hidden_size": width, "depth": max(len(numbers), 1)}
    if groups > 1 and not options.get("query_sides"):
        raise ValueError(
            f"this connector has {groups} query groups, whose sides do not follow from its tensors: give a config with"
            ' fusion_options={"query_sides": [...]}'
        )
    if width % options.get("num_heads", 16):
        raise ValueError(f"expected a width that 16 heads divide, got {width}: give a config with its num_heads")
    return {"fusion_options": options}


CAMBRIAN = Release(parts, llama_parts, sizes, vlm_options={"image_newline": True, "unpad": True})

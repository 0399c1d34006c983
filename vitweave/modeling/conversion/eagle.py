"""EAGLE X4 and X5 (arXiv:2408.15998) as NVlabs/EAGLE stores them."""

from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.modeling.conversion.encoder_names import encoder_names
from vitweave.modeling.conversion.language_models import llama_parts
from vitweave.modeling.conversion.release import Part, Release, encoder_parts, projector_part


def parts(config: MultiEncoderConfig) -> list[Part]:
    """The towers in the order of the list, and the projector; their maps side by side need no weights."""
    towers = [f"model.vision_tower.vision_towers.{index}.vision_tower." for index in range(len(config.encoder_configs))]
    return [*encoder_parts(config, towers, encoder_names), projector_part("model.mm_projector.")]


EAGLE = Release(parts=parts, language_parts=llama_parts)

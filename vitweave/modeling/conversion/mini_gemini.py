"""Mini-Gemini (arXiv:2403.18814) as dvlab-research/MGM stores it."""

from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.modeling.conversion.encoder_names import encoder_names
from vitweave.modeling.conversion.language_models import llama_parts
from vitweave.modeling.conversion.release import TOWER, Part, Release, TensorNames, encoder_parts, projector_part

ENCODERS = ("model.vision_tower.vision_tower.", "model.vision_tower_aux.")
MINING = {"query": "q", "aux": "k", "val": "v"}


def parts(config: MultiEncoderConfig) -> list[Part]:
    """CLIP, all stages of ConvNeXt, the mining of patches and the projector."""
    mining = [
        Part(
            f"model.vlm_uni_{official}_projector.",
            f"{TOWER}fusion.",
            TensorNames(renames=((r"^0\.", f"{ours}_norm."), (r"^1\.", f"{ours}_proj."))),
        )
        for official, ours in MINING.items()
    ]
    return [*encoder_parts(config, ENCODERS, encoder_names), *mining, projector_part("model.mm_projector.")]


MINI_GEMINI = Release(parts=parts, language_parts=llama_parts)

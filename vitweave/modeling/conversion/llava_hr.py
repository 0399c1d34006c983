"""LLaVA-HR (arXiv:2403.03003) as luogen1996/LLaVA-HR stores it."""

from torch import Tensor

from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.modeling.conversion.encoder_names import encoder_names
from vitweave.modeling.conversion.language_models import llama_parts
from vitweave.modeling.conversion.release import TOWER, Part, Release, TensorNames, encoder_parts, projector_part

ADAPTER = TensorNames(renames=((r"\.gate\.0\.", ".gate.fc1."), (r"\.gate\.2\.", ".gate.fc2.")))
ENCODERS = ("model.vision_tower.fast_vision_tower.vision_tower.", "model.vision_tower.slow_vision_tower.vision_tower.")
ADAPTERS = "model.vision_tower.align_stages_latent."


def parts(config: MultiEncoderConfig) -> list[Part]:
    """CLIP, ConvNeXt, the adapters between CLIP's blocks, the final alignment and the projector.

    The first training stage has adapters that its graph leaves out; so does a config without `adapter_layers`.
    """
    adapters = Part(ADAPTERS, f"{TOWER}fusion.adapters.", ADAPTER)
    if not (config.fusion_options or {}).get("adapter_layers"):
        adapters = Part(ADAPTERS, None, reason="adapters, which a tower with adapter_layers=[] does without")
    return [
        *encoder_parts(config, ENCODERS, encoder_names),
        adapters,
        Part("model.vision_tower.align_stages.0.", f"{TOWER}fusion."),
        projector_part("model.mm_projector."),
    ]


def sizes(config: MultiEncoderConfig, tensors: dict[str, Tensor]) -> dict:
    """Checkpoints without adapters are of the first training stage."""
    if any(name.startswith("fusion.adapters.") for name in tensors):
        return {}
    return {"fusion_options": {**(config.fusion_options or {}), "adapter_layers": []}}


LLAVA_HR = Release(parts=parts, language_parts=llama_parts, sizes=sizes)

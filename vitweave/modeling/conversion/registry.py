"""Which vanilla ViTs can be specialised, and why others cannot."""

from transformers import PreTrainedConfig

from vitweave.modeling.conversion.beit import BEIT
from vitweave.modeling.conversion.clip import CLIP
from vitweave.modeling.conversion.deit import DEIT
from vitweave.modeling.conversion.dinov2 import DINOV2, DINOV2_WITH_REGISTERS
from vitweave.modeling.conversion.dinov3_vit import DINOV3, DINOV3_GATED
from vitweave.modeling.conversion.host_family import HostFamily
from vitweave.modeling.conversion.timm_wrapper import TIMM, TIMM_GATED
from vitweave.modeling.conversion.vit import VIT, VIT_MAE

# model_type -> family; two families of one type differ in the names of a gated MLP.
HOST_FAMILIES: dict[str, HostFamily] = {
    "beit": BEIT,
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "deit": DEIT,
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2_WITH_REGISTERS,
    "dinov3_vit": DINOV3,
    "timm_wrapper": TIMM,
    "vit": VIT,
    "vit_mae": VIT_MAE,
}
GATED_FAMILIES: dict[str, HostFamily] = {"dinov3_vit": DINOV3_GATED, "timm_wrapper": TIMM_GATED}

NO_CLASS_TOKEN = "it has no class token, so there is nothing to specialise"
HIERARCHICAL = "it is a hierarchical model without a class token, so there is nothing to specialise"
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "siglip",
            "siglip_vision_model",
            "siglip2",
            "siglip2_vision_model",
            "ijepa",
            "vitdet",
            "sam",
            "sam_vision_model",
            "eva02_det_vit",
        ),
        NO_CLASS_TOKEN,
    ),
    **dict.fromkeys(
        ("swin", "swinv2", "hiera", "pvt", "pvt_v2", "segformer", "convnext", "convnextv2", "resnet", "focalnet"),
        HIERARCHICAL,
    ),
    "specialized_vit": "it is already specialised; open it with from_pretrained",
}


def find_family(config: PreTrainedConfig) -> HostFamily:
    """The family of a host config; others are refused with the reason."""
    model_type = getattr(config, "model_type", None)
    if model_type not in HOST_FAMILIES:
        reason = REFUSED.get(model_type, "its layers are not known to the conversion")
        raise ValueError(
            f"cannot specialise a model of type {model_type!r}: {reason}; supported: {', '.join(HOST_FAMILIES)}"
        )
    return HOST_FAMILIES[model_type]


def gated_family(model_type: str, gated: bool) -> HostFamily:
    """The family with the names of its plain or gated MLP."""
    return GATED_FAMILIES.get(model_type, HOST_FAMILIES[model_type]) if gated else HOST_FAMILIES[model_type]

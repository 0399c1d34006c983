"""The family of each model type; adding one is a line here and, for its facts, a line in `ENCODER_FACTS`."""

from vitweave.modeling.vision_families.base import VisionFamily
from vitweave.modeling.vision_families.composites import LayerFused, MultiEncoder
from vitweave.modeling.vision_families.eva02_det import Eva02Det
from vitweave.modeling.vision_families.maps import ConvNext, Dinov3ConvNext, MobileNetV2, Sam, Segformer, Swin, Swinv2
from vitweave.modeling.vision_families.patches_only import (
    ClipPatches,
    Dinov2Patches,
    Dinov3Patches,
    MaePatches,
    ResizedViTPatches,
)
from vitweave.modeling.vision_families.pix2struct import Pix2Struct
from vitweave.modeling.vision_families.specialized import Specialized
from vitweave.modeling.vision_families.timm_models import Timm
from vitweave.modeling.vision_families.vit import (
    Beit,
    Clip,
    Dinov2,
    Dinov3,
    Mae,
    PatchMean,
    Radio,
    ResizedViT,
    Siglip,
    Siglip2,
)

VISION_FAMILIES: dict[str, VisionFamily] = {
    "beit": Beit(),
    "clip_vision_model": Clip(),
    "convnext": ConvNext(),
    "convnextv2": ConvNext(),
    "deit": ResizedViT(),
    "dinov2": Dinov2(),
    "dinov2_with_registers": Dinov2(),
    "dinov3_convnext": Dinov3ConvNext(),
    "dinov3_vit": Dinov3(),
    "eva02_det_vit": Eva02Det(),
    "ijepa": PatchMean(),
    "internvl_vision": Dinov2(),
    "layer_fusion_vision": LayerFused(),
    "mobilenet_v2": MobileNetV2(),
    "multi_encoder_vision": MultiEncoder(),
    "pix2struct_vision_model": Pix2Struct(),
    "radio": Radio(),
    "sam_vision_model": Sam(),
    "segformer": Segformer(),
    "siglip2_vision_model": Siglip2(),
    "siglip_vision_model": Siglip(),
    "specialized_vit": Specialized(),
    "swin": Swin(),
    "swinv2": Swinv2(),
    "timm_wrapper": Timm(),
    "vit": ResizedViT(),
    "vit_mae": Mae(),
    "vit_msn": ResizedViT(),
}

# Run without their class token, for `class_token="drop_before"`; the same types as in `CLASS_TOKEN_OPTIONAL`.
PATCHES_ONLY_FAMILIES: dict[str, VisionFamily] = {
    "clip_vision_model": ClipPatches(),
    "deit": ResizedViTPatches(),
    "dinov2": Dinov2Patches(),
    "dinov2_with_registers": Dinov2Patches(),
    "dinov3_vit": Dinov3Patches(),
    "internvl_vision": Dinov2Patches(),
    "vit": ResizedViTPatches(),
    "vit_mae": MaePatches(),
    "vit_msn": ResizedViTPatches(),
}

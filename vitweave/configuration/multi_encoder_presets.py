"""Towers of published models by name, at full size or tiny."""

from collections.abc import Callable

from transformers import (
    CLIPVisionConfig,
    ConvNextConfig,
    Dinov2Config,
    InternVLVisionConfig,
    Pix2StructVisionConfig,
    PreTrainedConfig,
    SamVisionConfig,
    SiglipVisionConfig,
    TimmWrapperConfig,
)

from vitweave.configuration.configuration_eva02_det import Eva02DetConfig
from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HALF = [0.5, 0.5, 0.5]
STAGES = [1, 2, 3, 4]  # of a ConvNeXt
SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
AS_READ = {"final_norm": False}


def multi_encoder_preset(name: str, tiny: bool = False, **changes) -> MultiEncoderConfig:
    """The config of a published tower, for random weights or a converted checkpoint.

    Args:
        name: "leo", "eagle-x4", "eagle-x5", "llava-hr", "llava-hr-x", "mgm", "mgm-hd", "cambrian" or "internvl".
        tiny: the same structure with narrow, shallow encoders and small images, for tests and dry runs.
        changes: fields of `MultiEncoderConfig` that differ.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {sorted(PRESETS)}")
    return MultiEncoderConfig(**PRESETS[name](tiny) | changes)


# Encoders --------------------------------------------------------------------------------------------------------


def clip_large(tiny: bool) -> CLIPVisionConfig:
    """CLIP ViT-L/14-336."""
    if tiny:
        return CLIPVisionConfig(**SMALL, intermediate_size=64, projection_dim=32, image_size=56, patch_size=14)
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return CLIPVisionConfig(**sizes, projection_dim=768, image_size=336, patch_size=14, hidden_act="quick_gelu")


def convnext_large(tiny: bool) -> ConvNextConfig:
    """The trunk of OpenCLIP's ConvNeXt-L."""
    widths, depths = ([32, 32, 64, 64], [1, 1, 1, 1]) if tiny else ([192, 384, 768, 1536], [3, 3, 27, 3])
    return ConvNextConfig(hidden_sizes=widths, depths=depths)


def convnext_xxlarge(tiny: bool) -> tuple[PreTrainedConfig, dict]:
    """The trunk of OpenCLIP's ConvNeXt-XXL and what its config does not tell; its norms want timm (eps 1e-5)."""
    if tiny:
        return convnext_large(True), {}
    return TimmWrapperConfig(architecture="convnext_xxlarge"), {"channels": 3072, "stride": 32}


def sam_large(tiny: bool) -> SamVisionConfig:
    """SAM ViT-L."""
    if tiny:
        return SamVisionConfig(
            **SMALL, mlp_dim=64, output_channels=32, image_size=128, window_size=4, global_attn_indexes=[1, 3]
        )
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "mlp_dim": 4096}
    return SamVisionConfig(**sizes, global_attn_indexes=[5, 11, 17, 23])


def intern_vit(tiny: bool) -> InternVLVisionConfig:
    """InternViT-300M-448px, whose last layer is read without a norm."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    sizes = {**SMALL, "intermediate_size": 64} if tiny else sizes
    side = 56 if tiny else 448
    return InternVLVisionConfig(
        **sizes, image_size=[side, side], patch_size=[14, 14], attention_bias=True, use_mean_pooling=True
    )


def eva02_detector(tiny: bool) -> Eva02DetConfig:
    """EVA-02-L/16 of the COCO detector."""
    if tiny:
        return Eva02DetConfig(**SMALL, image_size=128, pretrain_image_size=64, window_size=4)
    return Eva02DetConfig()


def pix2struct_large(tiny: bool) -> Pix2StructVisionConfig:
    """The vision part of Pix2Struct-large."""
    if tiny:
        return Pix2StructVisionConfig(**SMALL, d_ff=64, d_kv=16, patch_embed_hidden_size=768, seq_len=64)
    return Pix2StructVisionConfig(
        hidden_size=1536, num_hidden_layers=18, num_attention_heads=24, d_ff=3968, d_kv=64, seq_len=4096
    )


def dinov2_giant(tiny: bool) -> Dinov2Config:
    """DINOv2 ViT-g/14."""
    if tiny:
        return Dinov2Config(**SMALL, mlp_ratio=2, image_size=56, patch_size=14, use_swiglu_ffn=True)
    sizes = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24}
    return Dinov2Config(**sizes, image_size=518, patch_size=14, use_swiglu_ffn=True)


def siglip_so400m(tiny: bool) -> SiglipVisionConfig:
    """SigLIP SO400M/14-384."""
    if tiny:
        return SiglipVisionConfig(**SMALL, intermediate_size=64, image_size=56, patch_size=14)
    sizes = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}
    return SiglipVisionConfig(**sizes, image_size=384, patch_size=14)


# Towers ----------------------------------------------------------------------------------------------------------


def leo(tiny: bool) -> dict:
    """LEO (arXiv:2501.06986): tokens of InternViT and SAM alternate, each through its own projector."""
    return {
        "encoder_configs": [intern_vit(tiny), sam_large(tiny)],
        "encoder_options": [
            {**AS_READ, "unshuffle": {"factor": 2, "order": "a"}, "frozen": True},
            {"image_size": 128 if tiny else 1024, "unshuffle": {"factor": 4, "order": "b"}, "frozen": True},
        ],
        "image_size": 56 if tiny else 448,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "fusion_type": "sequence_concat",
        "fusion_options": {"order": "interleave", "projector": "norm_mlp"},
        "hidden_size": 64 if tiny else 4096,  # of the language model: LEO projects before it fuses
    }


def eagle(tiny: bool, with_sam: bool) -> dict:
    """EAGLE (arXiv:2408.15998): maps of all encoders side by side on one grid; every one sees CLIP's normalisation."""
    convnext, channels = convnext_xxlarge(tiny)
    encoders = [
        (clip_large(tiny), {"image_size": 56 if tiny else 336, "class_token": "drop_before", **AS_READ}),
        (convnext, {**channels, **AS_READ}),
        # layer -2 is the first half of SAM's neck, a 1x1 convolution and its norm
        (sam_large(tiny), {"layer": -2, "unshuffle": {"factor": 2, "order": "b"}}),
        (eva02_detector(tiny), {}),
        # Pix2Struct standardises each image itself, from pixels that are not normalised
        (pix2struct_large(tiny), {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}),
    ]
    chosen = [pair for index, pair in enumerate(encoders) if with_sam or index != 2]
    return {
        "encoder_configs": [config for config, _ in chosen],
        "encoder_options": [{"resize": "bilinear_ac", **options} for _, options in chosen],
        "image_size": 128 if tiny else 1024,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "fusion_type": "channel_concat",
        "fusion_options": {"grid": 4 if tiny else 32},
    }


def llava_hr(tiny: bool, xxlarge: bool = False) -> dict:
    """LLaVA-HR (arXiv:2403.03003): ConvNeXt's last map goes into CLIP's blocks."""
    convnext, channels = convnext_xxlarge(tiny) if xxlarge else (convnext_large(tiny), {})
    fast = {"image_size": 112 if tiny else 448, "resize": "bilinear_ac", "class_token": "drop_before"}
    return {
        "encoder_configs": [clip_large(tiny), convnext],
        "encoder_options": [{**fast, **AS_READ}, {**channels, **AS_READ}],
        "image_size": 256 if tiny else 1024,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "fusion_type": "mixture_of_resolution",
    }


def mini_gemini(tiny: bool, crops: int = 1) -> dict:
    """Mini-Gemini (arXiv:2403.18814): CLIP's tokens mine windows of all four stages of ConvNeXt; HD with crops."""
    fast = {"image_size": 56 if tiny else 336, "resize": "bilinear", "layer": -2, **AS_READ, "frozen": True}
    return {
        "encoder_configs": [clip_large(tiny), convnext_large(tiny)],
        "encoder_options": [fast, {"layer": STAGES, **AS_READ, "frozen": True}],
        "image_size": (128 if tiny else 768) * crops,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "fusion_type": "patch_info_mining",
        "fusion_options": {"crops": crops, "has_global_view": crops > 1},
    }


def cambrian(tiny: bool) -> dict:
    """Cambrian-1 (arXiv:2406.16860): learnt queries read windows of four encoders."""
    sides = [56, 56, 56] if tiny else [384, 336, 378]
    convnext, _ = convnext_xxlarge(tiny)
    stages = {} if tiny else {"channels": 5760, "stride": 4}
    looks = [(HALF, HALF), (CLIP_MEAN, CLIP_STD), (IMAGENET_MEAN, IMAGENET_STD)]
    common = {"resize": "bicubic_antialias", "frozen": True}
    options = [
        {"image_size": side, "image_mean": mean, "image_std": std, **common}
        for side, (mean, std) in zip(sides, looks, strict=True)
    ]
    options[1] |= {"layer": -2, **AS_READ}
    return {
        "encoder_configs": [siglip_so400m(tiny), clip_large(tiny), dinov2_giant(tiny), convnext],
        "encoder_options": [*options, {"layer": STAGES, **stages, **AS_READ, "frozen": True}],
        "image_size": 128 if tiny else 1024,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "fusion_type": "spatial_vision_aggregator",
        "fusion_options": {
            "tower_sides": [4, 4, 4, 16] if tiny else [24, 24, 24, 96],
            **({"vision_hidden_size": 32, "num_heads": 2, "depth": 1} if tiny else {}),
        },
    }


def internvl(tiny: bool) -> dict:
    """InternVL (arXiv:2312.14238): one InternViT, four cells to a token."""
    return {
        "encoder_configs": [intern_vit(tiny)],
        "encoder_options": [{**AS_READ, "unshuffle": {"factor": 2, "order": "a"}}],
        "image_size": 56 if tiny else 448,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
        "fusion_type": "channel_concat",
    }


PRESETS: dict[str, Callable[[bool], dict]] = {
    "cambrian": cambrian,
    "eagle-x4": lambda tiny: eagle(tiny, with_sam=False),
    "eagle-x5": lambda tiny: eagle(tiny, with_sam=True),
    "internvl": internvl,
    "leo": leo,
    "llava-hr": llava_hr,
    "llava-hr-x": lambda tiny: llava_hr(tiny, xxlarge=True),
    "mgm": mini_gemini,
    "mgm-hd": lambda tiny: mini_gemini(tiny, crops=2),
}

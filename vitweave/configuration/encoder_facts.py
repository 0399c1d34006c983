"""What the config of a vision encoder says about its features: widths, grids, class tokens, layer by layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from vitweave.configuration.encoder_fusion_plans import FusionPlan
from vitweave.configuration.reductions import KEEP, Reduction, as_pair, ceil_reduction, floor_reduction, in_one


@dataclass(frozen=True)
class EncoderFacts:
    """Layer n of an encoder is what block (or stage) n returns, and layer 0 its embeddings.

    Args:
        hidden_sizes: channels of every layer, the embeddings first: num_layers + 1 entries.
        reductions: how every layer shrinks the grid of the one before it (layer 0: the grid of pixels).
        pooled_size: channels of the pooled output.
        num_class_tokens: leading class-like tokens (DeiT: class and distillation token, RADIO: one per teacher).
        num_registers: register tokens, between the class tokens and the patches.
        first_layer: 1 where the embeddings are a part of the first stage, so that there is no layer 0.
    """

    hidden_sizes: tuple[int, ...]
    reductions: tuple[Reduction, ...]
    num_channels: int
    pooled_size: int
    num_class_tokens: int = 0
    num_registers: int = 0
    first_layer: int = 0

    @property
    def num_layers(self) -> int:
        return len(self.hidden_sizes) - 1

    @property
    def strides(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of one grid cell of every layer."""
        height, width = 1, 1
        strides = []
        for reduction in self.reductions:
            height, width = height * reduction.stride[0], width * reduction.stride[1]
            strides.append((height, width))
        return tuple(strides)

    def grid_for(self, height: int, width: int, layer: int = -1) -> tuple[int, int]:
        """The (height, width) of a layer's grid for an image of `height` x `width` pixels."""
        grid = [height, width]
        for reduction in self.reductions[: range(self.num_layers + 1)[layer] + 1]:
            for axis, (kernel, stride, padding) in enumerate(zip(*reduction, strict=True)):
                grid[axis] = (grid[axis] + 2 * padding - kernel) // stride + 1
        return grid[0], grid[1]

    def resolve_layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Layer indices as they are stored: negative ones counted from the last layer and made absolute."""
        if isinstance(layers, int):
            raise ValueError(f"expected a list of layers, got {layers}; write layers=[{layers}] for one")
        resolved = tuple(self.num_layers + 1 + layer if layer < 0 else layer for layer in layers)
        wrong = [
            layer for layer, n in zip(layers, resolved, strict=True) if not self.first_layer <= n <= self.num_layers
        ]
        if wrong:
            first, last = self.first_layer, self.num_layers
            reason = "; it has no layer 0, its embeddings are not separate from layer 1" if first else ""
            raise ValueError(
                f"expected layers {first}..{last}, or -1..{first - last - 1} counted backwards from the last;"
                f" got {wrong} for an encoder of {last} layers{reason}"
            )
        if not resolved:
            raise ValueError(f"expected at least one layer, e.g. layers=[{self.num_layers}] for the last; got none")
        if len(set(resolved)) != len(resolved):
            raise ValueError(f"expected every layer once, got {list(layers)}, which are the layers {list(resolved)}")
        return resolved


@dataclass(frozen=True)
class PatchBudgetFacts(EncoderFacts):
    """Of an encoder that resizes every image so that it has as many whole patches as allowed (arXiv:2210.03347).

    The aspect is kept; the stride counts pixels of the resized image.

    Args:
        max_patches: the largest number of patches.
    """

    max_patches: int = 2048

    def grid_for(self, height: int, width: int, layer: int = -1) -> tuple[int, int]:
        patch_height, patch_width = self.strides[-1]
        # in this order the rounding is that of the native processor
        scale = (self.max_patches * (patch_height / height) * (patch_width / width)) ** 0.5
        rows, columns = int(scale * height / patch_height), int(scale * width / patch_width)
        return max(min(rows, self.max_patches), 1), max(min(columns, self.max_patches), 1)


@dataclass(frozen=True)
class TowerFacts(EncoderFacts):
    """Of several encoders on one grid: whether it grows with the image depends on which of them follow its size.

    Args:
        image_size: (height, width) the tower is made for.
        grid: (height, width) of its tokens at that size.
        plan_for: from another size to the `FusionPlan` at that size.
    """

    image_size: tuple[int, int] = (1, 1)
    grid: tuple[int, int] = (1, 1)
    plan_for: Callable[[tuple[int, int]], FusionPlan] | None = None

    def grid_for(self, height: int, width: int, layer: int = -1) -> tuple[int, int]:
        return self.grid if (height, width) == self.image_size else self.plan_for((height, width)).grid


def _plain_vit(config: PreTrainedConfig, num_class_tokens: int = 1, num_registers: int = 0) -> EncoderFacts:
    depth = config.num_hidden_layers
    return EncoderFacts(
        hidden_sizes=(config.hidden_size,) * (depth + 1),
        reductions=(floor_reduction(config.patch_size), *[KEEP] * depth),
        num_channels=config.num_channels,
        pooled_size=getattr(config, "pooler_output_size", None) or config.hidden_size,
        num_class_tokens=num_class_tokens,
        num_registers=num_registers,
    )


def _without_class_token(config: PreTrainedConfig) -> EncoderFacts:
    return _plain_vit(config, num_class_tokens=0)


def _deit(config: PreTrainedConfig) -> EncoderFacts:
    return _plain_vit(config, num_class_tokens=2)


def _with_registers(config: PreTrainedConfig) -> EncoderFacts:
    return _plain_vit(config, num_registers=config.num_register_tokens)


def _radio(config: PreTrainedConfig) -> EncoderFacts:
    facts = _plain_vit(config, config.num_cls_tokens, config.num_registers)
    summaries = [0, 1] if config.summary_idxs is None else config.summary_idxs
    return EncoderFacts(**{**vars(facts), "pooled_size": len(summaries) * config.hidden_size})


def _specialized_vit(config: PreTrainedConfig) -> EncoderFacts:
    return _plain_vit(config, config.num_cls_tokens, config.num_register_tokens)


def _sam(config: PreTrainedConfig) -> EncoderFacts:
    facts = _plain_vit(config, num_class_tokens=0)
    return EncoderFacts(  # the two halves of the neck, which changes the width, are two more layers
        hidden_sizes=(*facts.hidden_sizes, config.output_channels, config.output_channels),
        reductions=(*facts.reductions, KEEP, KEEP),
        num_channels=config.num_channels,
        pooled_size=config.output_channels,
    )


def _convnext(config: PreTrainedConfig) -> EncoderFacts:
    later = len(config.hidden_sizes) - 1
    return EncoderFacts(
        hidden_sizes=(config.hidden_sizes[0], *config.hidden_sizes),
        reductions=(floor_reduction(config.patch_size), KEEP, *[floor_reduction(2)] * later),
        num_channels=config.num_channels,
        pooled_size=config.hidden_sizes[-1],
    )


def _dinov3_convnext(config: PreTrainedConfig) -> EncoderFacts:
    later = len(config.hidden_sizes) - 1
    return EncoderFacts(
        hidden_sizes=(config.hidden_sizes[0], *config.hidden_sizes),
        reductions=(KEEP, floor_reduction(4), *[floor_reduction(2)] * later),
        num_channels=config.num_channels,
        pooled_size=config.hidden_sizes[-1],
        first_layer=1,
    )


def _swin(config: PreTrainedConfig) -> EncoderFacts:
    widths = [int(config.embed_dim * 2**stage) for stage in range(len(config.depths))]
    return EncoderFacts(
        hidden_sizes=(widths[0], *widths),
        reductions=(ceil_reduction(config.patch_size), KEEP, *[ceil_reduction(2)] * (len(widths) - 1)),
        num_channels=config.num_channels,
        pooled_size=widths[-1],
    )


def _segformer(config: PreTrainedConfig) -> EncoderFacts:
    patches = [
        Reduction(as_pair(kernel), as_pair(stride), as_pair(kernel // 2))
        for kernel, stride in zip(config.patch_sizes, config.strides, strict=True)
    ]
    return EncoderFacts(
        hidden_sizes=(config.hidden_sizes[0], *config.hidden_sizes),
        reductions=(KEEP, *patches),
        num_channels=config.num_channels,
        pooled_size=config.hidden_sizes[-1],
        first_layer=1,
    )


def _mobilenet_v2(config: PreTrainedConfig) -> EncoderFacts:
    def scaled(channels: int) -> int:  # the published rounding: to the divisor, but never more than 10 % down
        wanted = round(channels * config.depth_multiplier)
        divisor = config.depth_divisible_by
        rounded = max(config.min_depth, int(wanted + divisor / 2) // divisor * divisor)
        return rounded + divisor if rounded < 0.9 * wanted else rounded

    widths = [16, 24, 24, 32, 32, 32, 64, 64, 64, 64, 96, 96, 96, 160, 160, 160, 320]
    last = 1280 if config.finegrained_output and config.depth_multiplier < 1.0 else scaled(1280)
    stride, strides = 2, []
    for wanted in (2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1):
        strides.append(1 if stride == config.output_stride else wanted)  # from there on the blocks dilate instead
        stride *= strides[-1]
    return EncoderFacts(
        hidden_sizes=(*map(scaled, widths), last),
        reductions=(ceil_reduction(2), *map(ceil_reduction, strides), KEEP),
        num_channels=config.num_channels,
        pooled_size=last,
    )


def _pix2struct(config: PreTrainedConfig) -> EncoderFacts:
    num_channels, patch_values = 3, config.patch_embed_hidden_size
    side = round((patch_values / num_channels) ** 0.5)
    if num_channels * side**2 != patch_values:
        raise ValueError(
            f"expected patch_embed_hidden_size = {num_channels} channels x side x side, e.g. 768 for patches of 16x16"
            f" pixels, got {patch_values}"
        )
    depth = config.num_hidden_layers
    return PatchBudgetFacts(
        hidden_sizes=(config.hidden_size,) * (depth + 1),
        reductions=(floor_reduction(side), *[KEEP] * depth),
        num_channels=num_channels,
        pooled_size=config.hidden_size,
        max_patches=getattr(config, "max_patches", 2048),  # natively an option of the processor
    )


def _layer_fusion_vision(config: PreTrainedConfig) -> EncoderFacts:
    return layer_fusion_facts(encoder_facts(config.encoder_config))


def layer_fusion_facts(encoder: EncoderFacts) -> EncoderFacts:
    """The facts of a layer fusion, from those of the encoder whose layers it fuses: its output is its one layer."""
    hidden_size = encoder.hidden_sizes[-1]
    return replace(
        encoder,
        hidden_sizes=(hidden_size, hidden_size),
        reductions=(KEEP, in_one(encoder.reductions)),
        pooled_size=hidden_size,
        first_layer=1,
    )


def _multi_encoder_vision(config: PreTrainedConfig) -> EncoderFacts:
    if config.fused_grid is None:
        raise ValueError(
            f"expected a fusion of encoders that keeps a grid, got {config.fusion_type!r}, whose {config.num_tokens}"
            ' tokens have none; "channel_concat" and "add", for instance, keep one'
        )
    height, width = as_pair(config.image_size)
    stride = max(height // config.fused_grid[0], 1), max(width // config.fused_grid[1], 1)
    return TowerFacts(
        hidden_sizes=(config.fused_size, config.fused_size),
        reductions=(KEEP, floor_reduction(stride)),
        num_channels=config.num_channels,
        pooled_size=config.fused_size,
        first_layer=1,
        image_size=(height, width),
        grid=tuple(config.fused_grid),
        plan_for=config.plan_for,
    )


ENCODER_FACTS: dict[str, Callable[[PreTrainedConfig], EncoderFacts]] = {
    "beit": _plain_vit,
    "clip_vision_model": _plain_vit,
    "convnext": _convnext,
    "convnextv2": _convnext,
    "deit": _deit,
    "dinov2": _plain_vit,
    "dinov2_with_registers": _with_registers,
    "dinov3_convnext": _dinov3_convnext,
    "dinov3_vit": _with_registers,
    "eva02_det_vit": _without_class_token,
    "ijepa": _without_class_token,
    "internvl_vision": _plain_vit,
    "layer_fusion_vision": _layer_fusion_vision,
    "mobilenet_v2": _mobilenet_v2,
    "multi_encoder_vision": _multi_encoder_vision,
    "pix2struct_vision_model": _pix2struct,
    "radio": _radio,
    "sam_vision_model": _sam,
    "segformer": _segformer,
    "siglip2_vision_model": _without_class_token,
    "siglip_vision_model": _without_class_token,
    "specialized_vit": _specialized_vit,
    "swin": _swin,
    "swinv2": _swin,
    "vit": _plain_vit,
    "vit_mae": _plain_vit,
    "vit_msn": _plain_vit,
}


# The ViTs whose blocks and norms need no class token, so that it can be left out before the first block.
CLASS_TOKEN_OPTIONAL = (
    "clip_vision_model",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "internvl_vision",
    "vit",
    "vit_mae",
    "vit_msn",
)
CLASS_TOKEN = ("keep", "drop_before")


def vision_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision encoder's config in that of CLIP, SigLIP, SAM, InternVL ...; any other config is returned as it is."""
    return getattr(config, "vision_config", config)


def encoder_facts(config: PreTrainedConfig, class_token: str = "keep") -> EncoderFacts:
    """The facts of an encoder that are known from its config alone.

    Args:
        class_token: "keep", or "drop_before": it is left out before the first block (see `VisionEncoder`).
    """
    config = vision_part(config)
    check_class_token(config.model_type, class_token)
    if config.model_type not in ENCODER_FACTS:
        raise ValueError(
            f"expected a config of a known vision encoder, got the model_type {config.model_type!r};"
            f" known: {sorted(ENCODER_FACTS)}, and 'timm_wrapper' once its model is built"
        )
    try:
        facts = ENCODER_FACTS[config.model_type](config)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"expected a config of a {config.model_type!r} encoder, got one whose layers cannot be told"
            f" ({type(error).__name__}: {error})"
        ) from error
    return facts if class_token == "keep" else without_class_token(facts)


def without_class_token(facts: EncoderFacts) -> EncoderFacts:
    """The facts of the same ViT without its class tokens; the pooled output is then the mean of the patches."""
    return replace(facts, num_class_tokens=0, pooled_size=facts.hidden_sizes[-1])


def check_class_token(model_type: str, class_token: str):
    """Refuse an unknown way to treat the class token, and encoders that cannot do without theirs."""
    if class_token not in CLASS_TOKEN:
        raise ValueError(f"unknown class_token {class_token!r}; known: {list(CLASS_TOKEN)}")
    if class_token == "drop_before" and model_type not in CLASS_TOKEN_OPTIONAL:
        raise ValueError(
            f'class_token="drop_before" is not there for {model_type!r}: the encoder has no class token, or its blocks'
            f' need it; use class_token="keep" and read the patches only. Known: {list(CLASS_TOKEN_OPTIONAL)}'
        )

"""How one encoder of several sees the images, and what is read of it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields

from transformers import PreTrainedConfig

from vitweave.configuration.encoder_facts import EncoderFacts, encoder_facts
from vitweave.configuration.encoder_fusion_plans import Grid
from vitweave.configuration.option_types import check_option_types
from vitweave.configuration.reductions import as_pair

CHOICES = {
    "resize": ("bilinear", "bilinear_ac", "bicubic_antialias"),
    "class_token": ("drop_after", "drop_before", "keep"),
}


@dataclass(frozen=True)
class EncoderOptions:
    """
    Args:
        image_size: pixels (a side, or height and width) this encoder sees; None is what the tower gets. Images of
            another size than the tower's are scaled in proportion.
        resize: "bilinear", "bilinear_ac" (align_corners=True; LLaVA-HR, EAGLE) or "bicubic_antialias".
        image_mean, image_std: the pixels are re-normalised to these; None takes them as they come.
        layer: hidden state that is read, 0 = embeddings, negative ones counted from the last. Several give their maps
            side by side on the grid of the first (Mini-Gemini's and Cambrian's four stages of ConvNeXt).
        final_norm: apply the encoder's own final norm, where it acts on that layer.
        class_token: "drop_after" the blocks, "drop_before" them (LLaVA-HR, EAGLE), or "keep" it for the fusion.
        unshuffle: {"factor": 2, "order": "a"}: a block of factor x factor cells becomes one with more channels, in the
            order of InternVL ("a") or of torch ("b").
        channels, stride: of the layers that are read (their sum, and the first one's), for an encoder whose config does
            not tell (timm).
        frozen: keep the weights, dropout and statistics as they are.
        lora: adapters are put into this encoder by `vitweave.lora_config`.
    """

    image_size: int | Sequence[int] | None = None
    resize: str = "bilinear"
    image_mean: Sequence[float] | None = None
    image_std: Sequence[float] | None = None
    layer: int | Sequence[int] = -1
    final_norm: bool = True
    class_token: str = "drop_after"
    unshuffle: dict | None = None
    channels: int | None = None
    stride: int | None = None
    frozen: bool = False
    lora: bool = False

    def __post_init__(self):
        for option, known in CHOICES.items():
            if getattr(self, option) not in known:
                raise ValueError(f"expected {option} to be one of {list(known)}, got {getattr(self, option)!r}")
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("expected both image_mean and image_std of an encoder, or neither")
        if (self.channels is None) != (self.stride is None):
            raise ValueError("expected both channels and stride of an encoder, or neither")
        if self.unshuffle is not None and (
            set(self.unshuffle) != {"factor", "order"} or self.unshuffle["order"] not in ("a", "b")
        ):
            raise ValueError(
                f'expected unshuffle={{"factor": 2, "order": "a" or "b"}}, got {self.unshuffle}: "a" is the order of'
                ' InternVL, "b" that of torch.nn.functional.pixel_unshuffle'
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are read."""
        return (self.layer,) if isinstance(self.layer, int) else tuple(self.layer)

    @property
    def factor(self) -> int:
        """Of the unshuffling, 1 without it."""
        return 1 if self.unshuffle is None else self.unshuffle["factor"]


def read_options(options: dict | None, index: int) -> EncoderOptions:
    """The options of encoder `index`; a misspelt one is refused by name."""
    if not isinstance(options or {}, Mapping):
        raise ValueError(f"expected encoder_options[{index}] to be a mapping or None, got {options!r:.100}")
    known = [field.name for field in fields(EncoderOptions)]
    strange = sorted(set(map(str, options or {})) - set(known))
    if strange:
        raise ValueError(f"encoder_options[{index}] has no option {strange}; its options: {known}")
    check_option_types(EncoderOptions, options or {}, f"encoder_options[{index}]")
    return EncoderOptions(**(options or {}))


def output_of(
    config: PreTrainedConfig, options: EncoderOptions, size: Grid, known: Collection[str]
) -> tuple[int, Grid]:
    """Channels and grid of what is read of an encoder that sees images of `size` (height, width).

    Args:
        known: model types whose config tells.
    """
    if options.channels is not None:
        channels, grid = options.channels, (size[0] // options.stride, size[1] // options.stride)
    elif config.model_type in known:
        facts = encoder_facts(config, "drop_before" if options.class_token == "drop_before" else "keep")
        layers = facts.resolve_layers(options.layers)
        channels = sum(facts.hidden_sizes[layer] for layer in layers)
        grid = facts.grid_for(*size, layers[0])
        check_whole_patches(config, facts, size, layers[0])
    else:
        raise ValueError(
            f"the config of a {config.model_type!r} encoder does not tell its channels and grid: give them in its"
            ' options, e.g. {"channels": 1536, "stride": 32}'
        )
    if any(side % options.factor for side in grid):
        raise ValueError(
            f"expected a grid that unshuffling by {options.factor} divides, got {grid[0]}x{grid[1]} for images of"
            f" {size[0]}x{size[1]} pixels"
        )
    return channels * options.factor**2, (grid[0] // options.factor, grid[1] // options.factor)


def check_whole_patches(config: PreTrainedConfig, facts: EncoderFacts, size: Grid, layer: int):
    """Refuse image sizes of which some pixels would be left out, but for the size the encoder was made for (SigLIP at
    384 leaves out six)."""
    stride, own = facts.strides[layer], getattr(config, "image_size", None)
    if own is not None and as_pair(own) == size:
        return
    if any(pixels % step for pixels, step in zip(size, stride, strict=True)):
        nearest = [max(1, round(pixels / step)) * step for pixels, step in zip(size, stride, strict=True)]
        raise ValueError(
            f"expected an image size of whole patches of {stride[0]}x{stride[1]} pixels for the {config.model_type!r}"
            f" encoder, got {size[0]}x{size[1]}; the nearest is {nearest[0]}x{nearest[1]}"
        )


def size_for(options: EncoderOptions, tower_size: Grid, size: Grid) -> Grid:
    """What an encoder sees of an image of `size` when it sees `image_size` of one of `tower_size`."""
    own = tower_size if options.image_size is None else as_pair(options.image_size)
    return tuple(rounded(pixels * mine, whole) for pixels, mine, whole in zip(size, own, tower_size, strict=True))


def rounded(numerator: int, denominator: int) -> int:
    """`round(numerator / denominator)` in whole numbers alone: ONNX has no rounding of sizes."""
    whole, rest = numerator // denominator, numerator % denominator
    return whole + (2 * rest + whole % 2 + denominator - 1) // (2 * denominator)  # a half goes to the even number

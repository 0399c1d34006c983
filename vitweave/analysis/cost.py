"""What a tower or a vision-language model costs, part by part, before any weight is allocated."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, DynamicCache, PreTrainedConfig

from vitweave.analysis.meta_attention import FusedAttention
from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.configuration_multi_encoder_vlm import MultiEncoderVlmConfig
from vitweave.configuration.encoder_fusion_plans import Grid, cells
from vitweave.configuration.encoder_options import EncoderOptions
from vitweave.configuration.image_tokens import tokens_per_image
from vitweave.configuration.reductions import as_pair
from vitweave.modeling.encoder_fusion.base import EncoderMaps
from vitweave.modeling.modeling_multi_encoder import MultiEncoderTrunk
from vitweave.modeling.projectors import build_projector


@dataclass(frozen=True)
class CostRow:
    """One part of a model, for one image and its text.

    Args:
        parameters, weight_bytes, flops: None where the part cannot be built here (`note` says why). A multiplication
            with its addition is two FLOPs; forward only, a training step of a trained part takes about three times as
            many.
        tokens: what the part hands on (of the language model: what it reads).
        activation_bytes: what autograd keeps of the forward pass for the backward pass.
        trained: whether the part learns, by what the config freezes.
    """

    part: str
    parameters: int | None
    weight_bytes: int | None
    flops: int | None
    tokens: int
    activation_bytes: int | None
    trained: bool = True
    note: str = ""


@dataclass(frozen=True)
class Measured:
    """FLOPs of a call, and bytes that autograd keeps of it."""

    flops: int
    kept: int


def measure(function: Callable[[], object], weights: Sequence[Tensor] = ()) -> Measured:
    """Run a function on meta tensors and count.

    Args:
        weights: tensors that are there anyway, which keeping them costs nothing.
    """
    known = {tensor.untyped_storage()._cdata for tensor in weights}
    kept: dict[int, Tensor] = {}  # by storage: two views of one tensor are kept once

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    counter = FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counter, FusedAttention():
        function()
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    return Measured(counter.get_total_flops(), sum(sizes))


class Absent(nn.Module):
    """Stands for an encoder that cannot be built here."""

    def __init__(self, reason: str):
        super().__init__()
        self.reason = reason


class CountedTower(MultiEncoderTrunk):
    """A tower on the meta device; an encoder whose package is missing is left out, its map is what the config says."""

    def __init__(self, config: MultiEncoderConfig, all_frozen: bool = False):
        super().__init__(config)
        for part, options in zip(self.encoders, self.options, strict=True):
            part.requires_grad_(not (options.frozen or all_frozen))

    @property
    def missing(self) -> dict[int, str]:
        """Of encoders that cannot be built here, why."""
        return {index: part.reason for index, part in enumerate(self.encoders) if isinstance(part, Absent)}

    def build_encoder(self, member: PreTrainedConfig, options: EncoderOptions) -> nn.Module:
        try:
            return super().build_encoder(member, options)
        except ImportError as error:
            return Absent(first_sentence(error))

    def check_encoders(self):
        """What is missing cannot be checked; the config has been."""

    def run_encoder(self, index: int, pixel_values: Tensor, after: dict | None) -> tuple[Tensor, Tensor]:
        if index not in self.missing:
            return super().run_encoder(index, pixel_values, after)
        channels, grid = self.config.outputs_for(tuple(pixel_values.shape[-2:]))[index]
        made = pixel_values.new_empty(pixel_values.shape[0], channels, *grid)
        return made, made.new_empty(pixel_values.shape[0], 0, channels)


def first_sentence(error: Exception) -> str:
    """The first sentence of a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0]


def row_of(part: str, module: nn.Module, tokens: int, found: Measured, note: str = "") -> CostRow:
    """The row of a part that could be built."""
    own = list({id(weight): weight for weight in module.parameters()}.values())
    trained = not own or any(weight.requires_grad for weight in own)
    bytes_of_weights = sum(weight.numel() * weight.element_size() for weight in own)
    count = sum(weight.numel() for weight in own)
    return CostRow(part, count, bytes_of_weights, found.flops, tokens, found.kept, trained, note)


def tower_cost(
    config: MultiEncoderConfig, size: Grid, dtype: torch.dtype, tiles: int = 1, all_frozen: bool = False
) -> list[CostRow]:
    """A row per encoder, and one of the fusion.

    What a fusion does inside of an encoder (adapters between its blocks, and what the backward pass to them keeps of
    the encoder) is on the row of the fusion.
    """
    with torch.device("meta"):
        tower = CountedTower(config, all_frozen).to(dtype).eval()
        pixels = torch.empty(tiles, config.num_channels, *size, dtype=dtype)
    weights, outputs, rows, alone, seen = list(tower.parameters()), config.outputs_for(size), [], Measured(0, 0), []
    for index, member in enumerate(config.encoder_configs):
        name, tokens = f"encoder {index} ({kind_of(member)})", tiles * cells(outputs[index][1])
        found = measure(lambda index=index: seen.append(tower.run_encoder(index, pixels, None)), weights)
        if index in tower.missing:
            trained = not (config.options[index].frozen or all_frozen)
            rows.append(CostRow(name, None, None, None, tokens, None, trained, tower.missing[index]))
            continue
        alone = Measured(alone.flops + found.flops, alone.kept + found.kept)
        rows.append(row_of(name, tower.encoders[index], tokens, found))
    if tower.fusion.injects:  # it works in the midst of an encoder, which has to run with it
        whole = measure(lambda: tower.fuse(pixels, None, None), weights)
        found = Measured(whole.flops - alone.flops, max(whole.kept - alone.kept, 0))
    else:
        maps, prefixes = (
            [part.detach().requires_grad_(part.requires_grad) for part in one] for one in zip(*seen, strict=True)
        )
        keeps = any(options.class_token == "keep" for options in config.options)
        found = measure(lambda: tower.fusion(EncoderMaps(maps, prefixes if keeps else [])), weights)
    name = f"fusion ({config.fusion_type})"
    return [*rows, row_of(name, tower.fusion, tiles * config.plan_for(size).num_tokens, found)]


def kind_of(config: PreTrainedConfig) -> str:
    """The model type of an encoder, of timm's also the architecture."""
    return getattr(config, "architecture", None) or config.model_type


def language_rows(
    config: MultiEncoderVlmConfig, seen: int, read: int, text_tokens: int, dtype: torch.dtype, upstream: bool
) -> list[CostRow]:
    """The projector, and the language model's first pass over images and text.

    Args:
        seen: tokens of the tower for all tiles.
        read: tokens that the language model reads of them, newlines among them.
        upstream: whether something before the projector learns.
    """
    text, width = config.text_config, config.text_config.hidden_size
    with torch.device("meta"):
        projector = build_projector(
            config.projector_type, config.vision_config.fused_size, width, **(config.projector_options or {})
        ).to(dtype)
        model = AutoModel.from_config(text, dtype=dtype)
        head = nn.Linear(width, text.vocab_size, bias=False, dtype=dtype)
        features = torch.empty(1, seen, config.vision_config.fused_size, dtype=dtype).requires_grad_(upstream)
        inputs = torch.empty(1, read + text_tokens, width, dtype=dtype)
    if config.tie_word_embeddings:
        head.weight = model.get_input_embeddings().weight
    whole = nn.ModuleList([model, head]).requires_grad_(not config.freeze_language_model)
    learns = upstream or any(weight.requires_grad for weight in projector.parameters())
    inputs.requires_grad_(learns or not config.freeze_language_model)
    first = measure(lambda: projector(features), list(projector.parameters()))
    second = measure(
        lambda: head(model(inputs_embeds=inputs, past_key_values=DynamicCache()).last_hidden_state),
        list(whole.parameters()),
    )  # with an empty cache nobody looks into the positions for packed sequences, which meta tensors cannot tell
    note = "the head over all tokens, as in training"
    return [
        row_of(f"projector ({config.projector_type})", projector, read, first),
        row_of(f"language model ({text.model_type})", whole, read + text_tokens, second, note),
    ]


def model_cost(
    config: PreTrainedConfig,
    image_size: int | Sequence[int] | None = None,
    tiles: int = 1,
    text_tokens: int = 64,
    dtype: torch.dtype | str = "bfloat16",
) -> list[CostRow]:
    """What each part costs for one image, on the meta device: full-size models need no memory.

    Args:
        config: a `MultiEncoderConfig` or a `MultiEncoderVlmConfig`.
        image_size: pixels, a side or (height, width); None is the tower's.
        tiles: of the image; each runs through the encoders.
        text_tokens: that the language model reads beside the image.
        dtype: of weights and activations.
    """
    tower = getattr(config, "vision_config", config)
    if not isinstance(getattr(tower, "encoder_configs", None), list):
        raise ValueError(f"expected the config of a tower or of a vision-language model, got {config.model_type!r}")
    if tiles < 1 or text_tokens < 0:
        raise ValueError(f"expected tiles >= 1 and text_tokens >= 0, got {tiles} and {text_tokens}")
    size = as_pair(tower.image_size if image_size is None else image_size)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    rows = tower_cost(tower, size, dtype, tiles, getattr(config, "freeze_vision_encoders", False))
    if tower is config:
        return rows
    seen, plan = rows[-1].tokens, tower.plan_for(size)
    read = seen
    if config.image_newline or config.unpad:  # unpad cuts what is no square, as if padded to this one
        read = tokens_per_image(plan.num_tokens, tiles, plan.grid, config.image_newline, config.unpad, size)
    upstream = any(row.trained and row.parameters != 0 for row in rows)
    return [*rows, *language_rows(config, seen, read, text_tokens, dtype, upstream)]


def total_of(rows: Sequence[CostRow]) -> CostRow:
    """The sum of all parts that could be counted."""
    counted = [row for row in rows if row.parameters is not None]
    sums = {name: sum(getattr(row, name) for row in counted) for name in ("parameters", "weight_bytes", "flops")}
    kept = sum(row.activation_bytes for row in counted)
    note = "" if len(counted) == len(rows) else "without the parts that could not be counted"
    return CostRow("all", **sums, tokens=rows[-1].tokens, activation_bytes=kept, note=note)


def cost_table(rows: Sequence[CostRow]) -> str:
    """The rows and their sum as text."""
    cells_of = [("part", "parameters", "weights MiB", "GFLOPs", "tokens", "kept for backward MiB", "")]
    for row in (*rows, total_of(rows)):
        numbers = [
            "?" if value is None else form.format(value / unit)
            for value, form, unit in (
                (row.parameters, "{:,.0f}", 1),
                (row.weight_bytes, "{:,.1f}", 2**20),
                (row.flops, "{:,.1f}", 1e9),
                (row.tokens, "{:,.0f}", 1),
                (row.activation_bytes, "{:,.1f}", 2**20),
            )
        ]
        cells_of.append((row.part, *numbers, "; ".join(filter(None, ["" if row.trained else "frozen", row.note]))))
    widths = [max(len(line[column]) for line in cells_of) for column in range(6)]
    lines = []
    for line in cells_of:
        numbers = "  ".join(f"{cell:>{width}}" for cell, width in zip(line[1:6], widths[1:], strict=True))
        lines.append(f"{line[0]:<{widths[0]}}  {numbers}  {line[6]}".rstrip())
    return "\n".join(lines)


def as_json(rows: Sequence[CostRow]) -> list[dict]:
    """The rows as plain dicts."""
    return [asdict(row) for row in rows]

"""Any vision model of transformers seen as `VisionFeatures`: class tokens, registers, patches of chosen layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from vitweave.configuration.encoder_configs import resolve_config
from vitweave.configuration.encoder_facts import EncoderFacts, check_class_token, vision_part
from vitweave.modeling.own_models import build_model
from vitweave.modeling.tokens import split_prefix, tokens_to_map
from vitweave.modeling.vision_families.base import Inject, VisionFamily, unchanged
from vitweave.modeling.vision_families.registry import PATCHES_ONLY_FAMILIES, VISION_FAMILIES
from vitweave.modeling.vit_embeddings import check_pixel_values

logger = logging.get_logger(__name__)

HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
)  # where to load from

# what a model around the encoder must know of it to be loaded and placed
PASSED_ON = (
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_keys_to_ignore_on_load_missing",
    "_keys_to_ignore_on_load_unexpected",
)


@dataclass
class VisionFeatures:
    """What an encoder says about a batch of images; every tuple has one entry per layer asked for, in that order.

    Args:
        layers: the layers, counted as in `EncoderFacts` (0 = embeddings, n = after block or stage n).
        class_tokens: (batch, class tokens, hidden); 0 class tokens for encoders that have none.
        registers: (batch, registers, hidden).
        patches: (batch, patches, hidden), row by row.
        grids: (height, width), patches = height * width.
        pooled: (batch, pooled size), what the model itself returns as `pooler_output` (RADIO: its summary); where it
            returns none, the class token after the final norm, and without one the mean of the patches after it.
            None where the last layer was not asked for, because nothing behind the deepest layer asked for is run.
        final: class tokens, registers and patches of the last layer after the final norm (what the model itself returns
            as `last_hidden_state`), whatever `final_norm` says; only on request.
        states: the layers as the model has them, not taken apart: (batch, tokens, hidden), or maps.
    """

    layers: tuple[int, ...]
    class_tokens: tuple[Tensor, ...]
    registers: tuple[Tensor, ...]
    patches: tuple[Tensor, ...]
    grids: tuple[tuple[int, int], ...]
    pooled: Tensor | None = None
    final: tuple[Tensor, Tensor, Tensor] | None = None
    states: tuple[Tensor, ...] = ()

    @property
    def cls(self) -> tuple[Tensor | None, ...]:
        """The first class token of every layer, (batch, hidden); None for encoders that have none."""
        return tuple(tokens[:, 0] if tokens.shape[1] else None for tokens in self.class_tokens)

    @property
    def feature_maps(self) -> tuple[Tensor, ...]:
        """The patches of every layer as a map, (batch, hidden, height, width)."""
        return tuple(tokens_to_map(patches, grid) for patches, grid in zip(self.patches, self.grids, strict=True))


class VisionEncoder(nn.Module):
    """A vision model that returns the layers it is asked for, runs no block behind the deepest and keeps no other.

    It calls the native embeddings, blocks and final norm in turn (`vision_families`) instead of the native forward:
    recording hooks run every block and keep every state, raising from a hook to stop cannot be compiled or exported,
    and cutting the list of blocks would lose their weights on saving. So all weights stay where the native model has
    them (`model.*`), and the forward compiles to one graph.

    Image sizes: patches are cut as the native model cuts them. Most leave out the pixels at the right and bottom edge
    that fill no whole patch, Swin and the convolutional ones pad, RADIO cannot and is refused here with its patch size.
    Models trained at one size get interpolated position embeddings at any other.

    Args:
        config_or_model: a config or its dict (random weights), or a model, which is used as it is, not copied.
            Of a model of several parts (CLIP, SigLIP, SAM, InternVL) the vision part is taken.
        layers: which layers to return; negative ones count from the last and are stored absolute in `self.layers`.
        final_norm: apply the model's final norm to every layer returned, on the tokens to which the model itself
            applies it (CLIP: the class token). In hierarchical models it fits the last layer only.
        keep_final: return `VisionFeatures.final`; the last layer must be among `layers`.
        class_token: "drop_before" leaves the class token out before the first block, for ViTs whose blocks do not need
            it (CLIP as in EAGLE and LLaVA-HR, whose patches are then other ones; its positions are resampled with
            antialias, and no final norm is there for patches). Its own weights then get no gradient.
    """

    def __init__(
        self,
        config_or_model: PreTrainedConfig | dict | PreTrainedModel,
        layers: Sequence[int] = (-1,),
        final_norm: bool = True,
        keep_final: bool = False,
        class_token: str = "keep",
    ):
        super().__init__()
        if isinstance(config_or_model, nn.Module):
            model = find_vision_model(config_or_model)
        else:
            config = vision_part(resolve_config(config_or_model, role="the encoder's config"))
            family_of(config, class_token)  # an unknown kind is refused before it is built
            model = build_model(config)
        self.model, self.class_token = model, class_token
        self.family = family_of(model.config, class_token)
        self.facts: EncoderFacts = self.family.facts(model)
        self.layers = self.facts.resolve_layers(layers)
        self.final_norm, self.keep_final = final_norm, keep_final
        if keep_final and self.num_layers not in self.layers:
            raise ValueError(f"keep_final=True needs the last layer, {self.num_layers}, among the layers {self.layers}")
        for name in PASSED_ON:  # transformers gathers these from the direct children of a model
            setattr(self, name, getattr(model, name, None))
        tied = getattr(model, "all_tied_weights_keys", {})
        self.all_tied_weights_keys = {f"model.{key}": f"model.{value}" for key, value in tied.items()}
        plan = getattr(model, "_tp_plan", None) or {}
        self._tp_plan = {f"model.{name}": style for name, style in plan.items()}

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike,
        layers: Sequence[int] = (-1,),
        final_norm: bool = True,
        class_token: str = "keep",
        **options,
    ) -> "VisionEncoder":
        """The vision model of a checkpoint (also of CLIP, SigLIP, SAM, InternVL); `options` go to `from_pretrained`."""
        config = AutoConfig.from_pretrained(name, **{key: options[key] for key in HUB_OPTIONS if key in options})
        part = vision_part(config)
        family_of(part, class_token)
        if type(part) not in MODEL_MAPPING and not hasattr(part, "auto_map"):
            raise ValueError(
                f"AutoModel knows no {part.model_type!r}: load {name} with the class it was saved from, and give that"
                " model to VisionEncoder"
            )
        model, info = AutoModel.from_pretrained(name, config=part, output_loading_info=True, **options)
        missing = sorted(info["missing_keys"])
        if missing and part is not config:  # a tower that sits deeper in the checkpoint is loaded with its host
            model, info = AutoModel.from_pretrained(name, output_loading_info=True, **options)
            missing = sorted(info["missing_keys"])
        poolers = [key for key in missing if key.startswith("pooler.")]
        if missing and poolers == missing:
            logger.warning(f"{name} has no weights for {poolers}: `pooled` is untrained, the tokens are not affected.")
        elif missing:
            raise ValueError(f"expected {name} to hold a whole {config.model_type} encoder, but it lacks {missing}")
        return cls(model, layers=layers, final_norm=final_norm, class_token=class_token)

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def num_layers(self) -> int:
        return self.facts.num_layers

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """Channels of each layer asked for."""
        return tuple(self.facts.hidden_sizes[layer] for layer in self.layers)

    @property
    def strides(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of one patch of each layer asked for."""
        return tuple(self.facts.strides[layer] for layer in self.layers)

    def grids_for(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """The grid of each layer asked for, for an image of `height` x `width` pixels."""
        return tuple(self.facts.grid_for(height, width, layer) for layer in self.layers)

    def forward(
        self,
        pixel_values: Tensor,
        all_layers: bool = False,
        after: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> VisionFeatures:
        """
        Args:
            pixel_values: (batch, channels, height, width), normalised as the model's own processor does it.
            all_layers: return every layer, not only those of `self.layers`.
            after: what to inject between the blocks: `after[n]` takes the map (batch, hidden, height, width) of the
                patches after block n and returns the one that goes on instead, which is also what layer n then is.
                Class tokens and registers pass by. n = 1 .. the deepest layer asked for.
        """
        layers = tuple(range(self.facts.first_layer, self.num_layers + 1)) if all_layers else self.layers
        self.check(pixel_values)
        pixels = pixel_values.to(self.model.dtype)
        inject = self.injection(after, pixels.shape[-2:], max(layers)) if after else unchanged
        states, pooled = self.family.run(self.model, self.facts, pixels, layers, self.final_norm, inject)
        parts = [self.split(state, pixels.shape[-2:], layer) for state, layer in zip(states, layers, strict=True)]
        class_tokens, registers, patches, grids = zip(*parts, strict=True)
        final = None
        if self.keep_final:
            last = states[layers.index(self.num_layers)]
            last = last if self.final_norm else self.family.norm(self.model, last)
            final = self.split(last, pixels.shape[-2:], self.num_layers)[:3]
        return VisionFeatures(layers, class_tokens, registers, patches, grids, pooled, final, tuple(states))

    def check(self, pixel_values: Tensor):
        """Refuse images the model cannot take."""
        check_pixel_values(pixel_values, self.facts.num_channels, self.facts.strides[self.facts.first_layer])
        height, width = pixel_values.shape[-2:]
        deepest = max(self.layers)
        if min(self.facts.grid_for(height, width, deepest)) < 1:
            smallest = self.facts.strides[deepest]
            raise ValueError(
                f"expected an image of at least {smallest[0]}x{smallest[1]} pixels for layer {deepest}, got"
                f" {height}x{width}; resize it first"
            )
        self.family.check_size(self.model, height, width)

    def injection(
        self, after: Mapping[int, Callable[[Tensor], Tensor]], image_size: tuple[int, int], deepest: int
    ) -> Inject:
        """`after`, from maps to states as the family has them."""
        if not self.family.takes_injections:
            raise ValueError(
                f"expected no `after` for {type(self.model).__name__}, whose blocks are run by its own code; inject"
                " into another encoder"
            )
        wrong = sorted(layer for layer in after if not 1 <= layer <= deepest)
        if wrong:
            raise ValueError(
                f"expected `after` for the blocks 1..{deepest}, where {deepest} is the deepest layer asked for, got"
                f" {wrong}"
            )

        def inject(layer: int, state: Tensor) -> Tensor:
            if layer not in after:
                return state
            if state.ndim == 4:
                return self.injected(after[layer], state, layer)
            prefix = self.facts.num_class_tokens + self.facts.num_registers
            patches = tokens_to_map(state[:, prefix:], self.facts.grid_for(*image_size, layer))
            patches = self.injected(after[layer], patches, layer).flatten(2).transpose(1, 2)
            return torch.cat([state[:, :prefix], patches], dim=1) if prefix else patches

        return inject

    def injected(self, function: Callable[[Tensor], Tensor], patches: Tensor, layer: int) -> Tensor:
        """What goes on instead of a map; another shape is refused."""
        output = function(patches)
        if output.shape != patches.shape:
            raise ValueError(
                f"expected after[{layer}] to return a map of the shape it was given, {tuple(patches.shape)}, got"
                f" {tuple(output.shape)}"
            )
        return output

    def split(
        self, state: Tensor, image_size: tuple[int, int], layer: int
    ) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Class tokens, registers, patches and grid of one layer, given as tokens or as a map."""
        if state.ndim == 4:
            grid = (state.shape[2], state.shape[3])
            state = state.flatten(2).transpose(1, 2)  # (batch, patches, hidden)
        else:
            grid = self.facts.grid_for(*image_size, layer)
        return *split_prefix(state, self.facts.num_class_tokens, self.facts.num_registers), grid


def find_vision_model(model: nn.Module) -> PreTrainedModel:
    """The outermost part of `model` that is a known vision model: of a classifier its base, of CLIP its vision tower.

    A layer fusion and a tower of several encoders are such models, and found before the encoders in them.
    """
    for part in model.modules():
        family = VISION_FAMILIES.get(part.config.model_type) if isinstance(part, PreTrainedModel) else None
        if family is not None and isinstance(part, family.model_classes(part.config)):
            return part
    raise ValueError(
        f"expected a model that holds a known vision encoder, got {type(model).__name__};"
        f" known model types: {sorted(VISION_FAMILIES)}"
    )


def family_of(config: PreTrainedConfig, class_token: str = "keep") -> VisionFamily:
    """How models of this config are run."""
    if config.model_type not in VISION_FAMILIES:
        raise ValueError(
            f"expected a config of a known vision encoder, got the model_type {config.model_type!r};"
            f" known: {sorted(VISION_FAMILIES)}; another one is a line in VISION_FAMILIES and in ENCODER_FACTS"
        )
    check_class_token(config.model_type, class_token)
    return (VISION_FAMILIES if class_token == "keep" else PATCHES_ONLY_FAMILIES)[config.model_type]

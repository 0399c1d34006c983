"""Config of several vision encoders in one tower."""

from collections.abc import Sequence

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from vitweave.configuration.configuration_base import VitweaveConfig
from vitweave.configuration.encoder_configs import resolve_config
from vitweave.configuration.encoder_facts import ENCODER_FACTS, encoder_facts, vision_part
from vitweave.configuration.encoder_fusion_plans import FUSION_PLANS, FusionPlan, Grid
from vitweave.configuration.encoder_options import EncoderOptions, output_of, read_options, size_for
from vitweave.configuration.option_types import check_option_types
from vitweave.configuration.reductions import as_pair


class EncoderSubConfigs:
    """The encoders' configs as sub-configs by name, so that transformers hands dtype and attention on to each."""

    def __get__(self, config: "MultiEncoderConfig | None", owner: type) -> dict[str, type]:
        members = [] if config is None else vars(config).get("encoder_configs") or []
        return {f"encoder_{index}": type(member) for index, member in enumerate(members)}


@strict
class MultiEncoderConfig(BackboneConfigMixin, VitweaveConfig):
    """Vision encoders, at the same or at different resolutions, whose features become one token sequence or map.

    Args:
        encoder_configs: any vision encoders, own composites among them (of CLIP, SigLIP and the like the vision part).
        encoder_options: a dict per encoder, see `EncoderOptions`; None is the defaults for all.
        image_size: pixels of the tower's input, a side or (height, width).
        image_mean, image_std: how that input is normalised; needed where an encoder wants its own.
        fusion_type: see `vitweave/modeling/encoder_fusion/registry.py`.
        fusion_options: arguments of that fusion's constructor.
        hidden_size: channels of the tokens; None is what follows from the encoders and the fusion.
    """

    model_type = "multi_encoder_vision"
    sub_configs = EncoderSubConfigs()

    encoder_configs: list | tuple | None = None
    encoder_options: list | tuple | None = None
    image_size: int | list[int] | tuple[int, ...] = 224
    image_mean: list[float] | tuple[float, ...] | None = None
    image_std: list[float] | tuple[float, ...] | None = None
    fusion_type: str = "channel_concat"
    fusion_options: dict | None = None
    hidden_size: int | None = None
    initializer_range: float = 0.02
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **extra):
        if self.encoder_configs is None:
            self.encoder_configs = [{"model_type": "specialized_vit"}, {"model_type": "mobilenet_v2"}]
        if not self.encoder_configs:
            raise ValueError("expected at least one encoder in encoder_configs, got none")
        given = self.encoder_options
        self.encoder_options = [dict(entry or {}) for entry in given or [{}] * len(self.encoder_configs)]
        if len(self.encoder_options) != len(self.encoder_configs):
            raise ValueError(
                f"expected one entry of encoder_options per encoder, {len(self.encoder_configs)}, got"
                f" {len(self.encoder_options)}"
            )
        self.check_normalisation()
        if self.fusion_type == "mixture_of_resolution":
            self.fusion_options = {"adapter_layers": self.quarters()} | (self.fusion_options or {})
        if self.fusion_type == "sequence_concat" and any(self.kept_tokens()):
            self.fusion_options = {"num_prefixes": self.kept_tokens()} | (self.fusion_options or {})
        plan = self.plan  # every size that does not fit is refused here
        self.stage_names = ["map1"] if plan.grid else []
        extra.pop("stage_names", None)
        features, indices = extra.pop("out_features", None), extra.pop("out_indices", None)
        if self.stage_names:
            self.set_output_features_output_indices(features, indices)
        super().__post_init__(**extra)

    def __setattr__(self, name: str, value):
        if name == "encoder_configs" and value is not None:
            saved_by = getattr(self, "transformers_version", None)
            roles = (f"encoder_configs[{index}]" for index in range(len(value)))
            value = [vision_part(resolve_config(c, role, saved_by)) for c, role in zip(value, roles, strict=True)]
        super().__setattr__(name, value)

    def __getattr__(self, name: str):
        if name.startswith("encoder_") and name.removeprefix("encoder_").isdigit():
            members = vars(self).get("encoder_configs") or []
            if int(name.removeprefix("encoder_")) < len(members):
                return members[int(name.removeprefix("encoder_"))]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def to_dict(self) -> dict:
        """As in transformers, with the encoders' configs written out."""
        return self.with_encoders(super().to_dict())

    def to_diff_dict(self) -> dict:
        """As in transformers, with the encoders' configs written out."""
        return self.with_encoders(super().to_diff_dict())

    def with_encoders(self, entries: dict) -> dict:
        """The entries of a config.json, whose encoders are dicts."""
        members = [member.to_dict() for member in self.encoder_configs]
        entries["encoder_configs"] = [{k: v for k, v in m.items() if k != "transformers_version"} for m in members]
        return entries

    def check_normalisation(self):
        """Refuse an encoder with a normalisation of its own in a tower that does not say how its input is."""
        asks = [index for index, options in enumerate(self.options) if options.image_mean is not None]
        if asks and (self.image_mean is None or self.image_std is None):
            raise ValueError(
                f"the encoders {asks} want pixels of their own image_mean and image_std, so the tower must know how its"
                " input is normalised: give it image_mean and image_std, too"
            )

    def quarters(self) -> list[int]:
        """Ends of the first three quarters of the first encoder's blocks."""
        depth = encoder_facts(self.encoder_configs[0]).num_layers
        return sorted({max(1, round(part * depth / 4)) for part in (1, 2, 3)})

    def kept_tokens(self) -> list[int]:
        """Class tokens and registers each encoder keeps for the fusion; 0 where its config does not tell (timm)."""
        kept = []
        for config, options in zip(self.encoder_configs, self.options, strict=True):
            kept.append(0)
            if options.class_token == "keep" and config.model_type in ENCODER_FACTS:
                facts = encoder_facts(config)
                kept[-1] = facts.num_class_tokens + facts.num_registers
        return kept

    @property
    def options(self) -> list[EncoderOptions]:
        """The options of every encoder."""
        return [read_options(entry, index) for index, entry in enumerate(self.encoder_options)]

    def outputs_for(self, size: Grid) -> list[tuple[int, Grid]]:
        """Channels and grid of what is read of every encoder, for an image of `size` (height, width)."""
        tower = as_pair(self.image_size)
        return [
            output_of(config, options, size_for(options, tower, size), ENCODER_FACTS)
            for config, options in zip(self.encoder_configs, self.options, strict=True)
        ]

    @property
    def in_channels(self) -> list[int]:
        """Channels of what is read of every encoder."""
        return [channels for channels, _ in self.outputs_for(as_pair(self.image_size))]

    @property
    def grids(self) -> list[Grid]:
        """Grid of what is read of every encoder at `image_size`."""
        return [grid for _, grid in self.outputs_for(as_pair(self.image_size))]

    @property
    def plan(self) -> FusionPlan:
        """Channels, tokens and grid of the fused features at `image_size`."""
        return self.plan_for(as_pair(self.image_size))

    def plan_for(self, size: Sequence[int]) -> FusionPlan:
        """The plan for images of `size` (height, width)."""
        if self.fusion_type not in FUSION_PLANS:
            raise ValueError(f"unknown fusion_type {self.fusion_type!r}; known: {sorted(FUSION_PLANS)}")
        plan, options = FUSION_PLANS[self.fusion_type], self.fusion_options or {}
        check_option_types(plan, options, f"the encoder fusion {self.fusion_type!r}")
        channels, grids = zip(*self.outputs_for(as_pair(size)), strict=True)
        return plan(channels, grids, self.hidden_size, **options)

    @property
    def num_tokens(self) -> int:
        """Tokens of an image of `image_size`."""
        return self.plan.num_tokens

    @property
    def fused_size(self) -> int:
        """Channels of the fused tokens."""
        return self.plan.hidden_size

    @property
    def fused_grid(self) -> Grid | None:
        """(height, width) of the fused tokens at `image_size`, where they are a map."""
        return self.plan.grid

    @property
    def num_channels(self) -> int:
        """Of the images."""
        return encoder_channels(self.encoder_configs[0])


def encoder_channels(config: PreTrainedConfig) -> int:
    """Channels of the images an encoder takes; 3 where its config does not tell (timm)."""
    return encoder_facts(config).num_channels if config.model_type in ENCODER_FACTS else 3

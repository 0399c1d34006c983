"""Config of an encoder whose layers are fused."""

from collections.abc import Sequence

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from vitweave.configuration.configuration_base import VitweaveConfig
from vitweave.configuration.encoder_configs import resolve_config
from vitweave.configuration.encoder_facts import ENCODER_FACTS, encoder_facts, vision_part

LAYER_PRESETS = ("quarters", "thirds", "last4", "all", "clip_3_18_23")


@strict
class LayerFusionConfig(BackboneConfigMixin, VitweaveConfig):
    """A vision encoder whose `layers` are fused into one embedding, and patches where the fusion is dense.

    Args:
        encoder_config: any vision encoder (of CLIP, SigLIP and the like the vision part); None is a specialised ViT.
        layers: hidden states to fuse, 0 = embeddings, n = after block n, negative ones counted from the last; or a
            preset: "quarters" (the ends of the four quarters), "thirds", "last4", "all" (blocks), "clip_3_18_23"
            (CLIP-L, arXiv:2503.06063). Stored as absolute indices, shallow to deep.
        fusion_type: see `vitweave/modeling/layer_fusion/registry.py`.
        fusion_options: arguments of that fusion's constructor.
        out_features / out_indices: which maps the backbone returns; None is all. How many there are depends on the
            fusion, so they are named ("map1", ...) and checked when the backbone is built.
    """

    model_type = "layer_fusion_vision"
    sub_configs = {"encoder_config": AutoConfig}  # the form that works from transformers 5.13 to the newest

    encoder_config: dict | PreTrainedConfig | None = None
    layers: str | list[int] | tuple[int, ...] = "quarters"
    fusion_type: str = "attentive_probe"
    fusion_options: dict | None = None
    initializer_range: float = 0.02
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **extra):
        self.stage_names = None
        extra.pop("stage_names", None)
        self.set_output_features_output_indices(extra.pop("out_features", None), extra.pop("out_indices", None))
        encoder = resolve_config(
            self.encoder_config or {"model_type": "specialized_vit"}, "encoder_config", self.transformers_version
        )
        self.encoder_config = vision_part(encoder)
        self.layers = self.chosen_layers(self.layers)
        super().__post_init__(**extra)

    def set_output_features_output_indices(self, out_features: list | None, out_indices: list | None):
        """As in transformers once a backbone has named its maps; until then the choice is only kept."""
        if self.stage_names is not None:
            return super().set_output_features_output_indices(out_features, out_indices)
        self._out_features = out_features
        self._out_indices = None if out_indices is None else list(out_indices)

    def chosen_layers(self, layers: str | Sequence[int]) -> list[int]:
        """Absolute layer indices, shallow to deep."""
        if self.encoder_config.model_type not in ENCODER_FACTS:  # timm: its layers are known once it is built
            if isinstance(layers, str) or min(layers, default=0) < 0:
                raise ValueError(
                    f"expected a list of layers counted from the first for an encoder of type"
                    f" {self.encoder_config.model_type!r}, whose depth its config does not tell; got {layers!r}"
                )
            return sorted(layers)
        facts = encoder_facts(self.encoder_config)
        if isinstance(layers, str):
            layers = preset_layers(layers, facts.num_layers)
        return sorted(facts.resolve_layers(layers))

    @property
    def hidden_size(self) -> int:
        """Channels of the fused embedding."""
        return encoder_facts(self.encoder_config).hidden_sizes[self.layers[-1]]

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the encoder."""
        return encoder_facts(self.encoder_config).num_layers

    @property
    def num_channels(self) -> int:
        return encoder_facts(self.encoder_config).num_channels


def preset_layers(name: str, num_layers: int) -> list[int]:
    """The layers behind a preset's name, for an encoder of `num_layers` blocks; each once."""
    presets = {
        "quarters": [round(part * num_layers / 4) for part in range(1, 5)],
        "thirds": [round(part * num_layers / 3) for part in range(1, 4)],
        "last4": list(range(num_layers - 3, num_layers + 1)),
        "all": list(range(1, num_layers + 1)),
        "clip_3_18_23": [3, 18, 23],
    }
    if name not in presets:
        raise ValueError(f"unknown layer preset {name!r:.100}; known: {list(LAYER_PRESETS)}, or give a list of layers")
    return sorted({max(1, layer) for layer in presets[name]})

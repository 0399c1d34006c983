"""A config, or the dict of one, to a config object: own types first, then transformers' registry."""

from collections.abc import Callable

from transformers import CONFIG_MAPPING, PreTrainedConfig

from vitweave.configuration.config_entries import check_stored, without_auto_map

STRUCTURE = ("attribute_map", "sub_configs", "sub_configs_defaults", "base_config_key", "has_no_defaults_at_init")


def _eva02_det_vit() -> type[PreTrainedConfig]:
    from vitweave.configuration.configuration_eva02_det import Eva02DetConfig

    return Eva02DetConfig


def _layer_fusion_vision() -> type[PreTrainedConfig]:
    from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig  # it imports this module

    return LayerFusionConfig


def _modality_fusion_vision() -> type[PreTrainedConfig]:
    from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig

    return ModalityFusionConfig


def _multi_encoder_vision() -> type[PreTrainedConfig]:
    from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig

    return MultiEncoderConfig


def _multi_encoder_vlm() -> type[PreTrainedConfig]:
    from vitweave.configuration.configuration_multi_encoder_vlm import MultiEncoderVlmConfig

    return MultiEncoderVlmConfig


def _specialized_vit() -> type[PreTrainedConfig]:
    from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig

    return SpecializedViTConfig


# Asked before transformers' own table, so that a self-contained bundle works where nothing is registered.
OWN_CONFIGS: dict[str, Callable[[], type[PreTrainedConfig]]] = {
    "eva02_det_vit": _eva02_det_vit,
    "layer_fusion_vision": _layer_fusion_vision,
    "modality_fusion_vision": _modality_fusion_vision,
    "multi_encoder_vision": _multi_encoder_vision,
    "multi_encoder_vlm": _multi_encoder_vlm,
    "specialized_vit": _specialized_vit,
}


def resolve_config(
    config: dict | PreTrainedConfig, role: str = "backbone_config", saved_by: str | None = None
) -> PreTrainedConfig:
    """Turn the dict of any registered config into that config.

    Args:
        config: a config object (returned as it is) or its dict with a `model_type`.
        role: the option's name, for error messages.
        saved_by: the `transformers_version` of the config around it, if that was read from a file: entries that the
            installed version does not know are then kept with a warning, and refused otherwise.
    """
    if isinstance(config, PreTrainedConfig):
        return config
    check_stored(config, role)
    if config.get("per_layer_config") is not None and role != "text_config":
        raise ValueError(f"expected an encoder with the same options for all layers in {role}, got a per_layer_config")
    options = without_auto_map(dict(config))  # a part never brings code
    model_type = options.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ValueError(
            f"{role} needs a 'model_type', e.g. 'dinov2'; got {model_type!r:.100} among the keys"
            f" {sorted(map(str, config))}"
        )
    if model_type in OWN_CONFIGS:
        options = {"transformers_version": saved_by} | options
        return OWN_CONFIGS[model_type]().from_dict(options)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{role} has the unknown model_type {model_type!r:.100}; known are the model types of the installed"
            f" transformers and {sorted(OWN_CONFIGS)}. If it belongs to another package, import that package first."
        )
    return native_config(CONFIG_MAPPING[model_type], options, role)


def native_config(config_class: type[PreTrainedConfig], options: dict, role: str) -> PreTrainedConfig:
    """A config of transformers from a dict, whose mistakes end there in errors of any kind."""
    replaced = sorted(name for name in options if name in STRUCTURE or callable(getattr(config_class, name, None)))
    if replaced:
        raise ValueError(
            f"expected options of {config_class.__name__} in {role}, got {replaced[0]!r}, a part of the class"
        )
    try:
        return config_class.from_dict(options)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError) as error:
        raise ValueError(
            f"expected the options of a {config_class.__name__} in {role}, got some that it cannot be made from"
            f" ({type(error).__name__}: {error})"
        ) from error

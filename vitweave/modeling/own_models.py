"""The classes behind our own model types: asked before the Auto registries.

The imports stand inside the functions because composites import this module and are listed in it, and because a
self-contained bundle on the Hub, where nothing is registered, resolves its nested parts through here.
"""

from collections.abc import Mapping

import torch
from transformers import AutoBackbone, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING, MODEL_MAPPING


def _eva02_det_vit() -> dict[str, type[PreTrainedModel]]:
    from vitweave.modeling.modeling_eva02_det import Eva02DetBackbone, Eva02DetModel

    return {"model": Eva02DetModel, "backbone": Eva02DetBackbone}


def _specialized_vit() -> dict[str, type[PreTrainedModel]]:
    from vitweave.modeling.modeling_specialized_vit import SpecializedViTBackbone, SpecializedViTModel

    return {"model": SpecializedViTModel, "backbone": SpecializedViTBackbone}


def _layer_fusion_vision() -> dict[str, type[PreTrainedModel]]:
    from vitweave.modeling.modeling_layer_fusion import LayerFusionBackbone, LayerFusionModel

    return {"model": LayerFusionModel, "backbone": LayerFusionBackbone}


def _modality_fusion_vision() -> dict[str, type[PreTrainedModel]]:
    from vitweave.modeling.modeling_modality_fusion import ModalityFusionBackbone, ModalityFusionModel

    return {"model": ModalityFusionModel, "backbone": ModalityFusionBackbone}


def _multi_encoder_vision() -> dict[str, type[PreTrainedModel]]:
    from vitweave.modeling.modeling_multi_encoder import MultiEncoderBackbone, MultiEncoderModel

    return {"model": MultiEncoderModel, "backbone": MultiEncoderBackbone}


def _pix2struct_vision_model() -> dict[str, type[PreTrainedModel]]:
    from transformers import Pix2StructVisionModel  # not ours, but AutoModel does not know it

    return {"model": Pix2StructVisionModel}


def _multi_encoder_vlm() -> dict[str, type[PreTrainedModel]]:
    from vitweave.modeling.modeling_multi_encoder_vlm import MultiEncoderVlmModel

    return {"model": MultiEncoderVlmModel}


OWN_MODELS = {
    "eva02_det_vit": _eva02_det_vit,
    "layer_fusion_vision": _layer_fusion_vision,
    "modality_fusion_vision": _modality_fusion_vision,
    "multi_encoder_vision": _multi_encoder_vision,
    "multi_encoder_vlm": _multi_encoder_vlm,
    "pix2struct_vision_model": _pix2struct_vision_model,
    "specialized_vit": _specialized_vit,
}


def build_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The base model of a config (random weights): own types first, then `AutoModel`."""
    if config.model_type in OWN_MODELS:
        return OWN_MODELS[config.model_type]()["model"](config)
    return build_native(AutoModel, MODEL_MAPPING, config)


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """The backbone of a config (random weights): own types first, then `AutoBackbone`."""
    own = OWN_MODELS.get(config.model_type, dict)()
    if "backbone" in own:
        return own["backbone"](config)
    return build_native(AutoBackbone, MODEL_FOR_BACKBONE_MAPPING, config)


def build_native(auto_class: type, known: Mapping, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of transformers from its config, or an error; never one whose code the config names.

    Args:
        known: config class -> model class, of that Auto class.
    """
    if type(config) not in known:
        raise ValueError(
            f"expected a config that {auto_class.__name__} opens, got the model_type {config.model_type!r}"
        )
    try:
        return without_absent_pooler(auto_class.from_config(config))
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError) as error:
        raise ValueError(
            f"expected a config of which {auto_class.__name__} builds a {config.model_type!r} model, got one that it"
            f" cannot ({type(error).__name__}: {error})"
        ) from error


def without_absent_pooler(model: PreTrainedModel) -> PreTrainedModel:
    """Take the pooler off a model whose config says `use_pooler=False`, which those of transformers do not read."""
    if getattr(model.config, "use_pooler", True) is False and getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model

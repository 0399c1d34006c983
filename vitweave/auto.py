"""One table of what belongs to which Auto class, and its registration."""

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_specialized_vit import (
    SpecializedViTBackbone,
    SpecializedViTForImageClassification,
    SpecializedViTModel,
)

# config class, {Auto class: model class}, image processors by backend (None = the host's own)
FAMILIES = (
    (
        SpecializedViTConfig,
        {
            AutoModel: SpecializedViTModel,
            AutoBackbone: SpecializedViTBackbone,
            AutoModelForImageClassification: SpecializedViTForImageClassification,
        },
        None,
    ),
)


def register():
    """Make every vitweave type known to transformers' Auto classes; repeating it changes nothing."""
    for config_class, models, _ in FAMILIES:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, model_class in models.items():
            auto_class.register(config_class, model_class, exist_ok=True)

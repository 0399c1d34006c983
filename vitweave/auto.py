"""One table of what belongs to which Auto class, and its registration."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)
from transformers.models.auto.image_processing_auto import (
    AutoImageProcessor,  # the public name needs torchvision at 5.13
)

from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.modeling_specialized_vit import (
    SpecializedViTBackbone,
    SpecializedViTForImageClassification,
    SpecializedViTModel,
)
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
from vitweave.processing.image_processing_segmentation import SegmentationImageProcessor

# config class, {Auto class: model class}, image processors by backend (None: the host's own processor is kept)
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
    (
        DensePredictorConfig,
        {AutoModelForSemanticSegmentation: DensePredictorForSemanticSegmentation},
        {"torchvision": SegmentationImageProcessor, "pil": SegmentationImageProcessorPil},
    ),
)


def register():
    """Make every vitweave type known to transformers' Auto classes; repeating it changes nothing."""
    for config_class, models, image_processors in FAMILIES:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, model_class in models.items():
            auto_class.register(config_class, model_class, exist_ok=True)
        if image_processors is not None:
            AutoImageProcessor.register(config_class, image_processor_classes=image_processors, exist_ok=True)

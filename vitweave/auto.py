"""One table of what belongs to which Auto class, and its registration."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForImageToImage,
    AutoModelForSemanticSegmentation,
    AutoModelForZeroShotImageClassification,
)
from transformers.models.auto.image_processing_auto import (
    AutoImageProcessor,  # the public name needs torchvision at 5.13
)
from transformers.models.auto.processing_auto import AutoProcessor

from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.configuration_eva02_det import Eva02DetConfig
from vitweave.configuration.configuration_image_text_retriever import ImageTextRetrieverConfig
from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig
from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.configuration_multi_encoder_vlm import MultiEncoderVlmConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.modeling_depth import DensePredictorForDepthEstimation
from vitweave.modeling.modeling_eva02_det import Eva02DetBackbone, Eva02DetModel
from vitweave.modeling.modeling_image_text_retriever import ImageTextRetrieverModel
from vitweave.modeling.modeling_layer_fusion import (
    LayerFusionBackbone,
    LayerFusionForImageClassification,
    LayerFusionModel,
)
from vitweave.modeling.modeling_modality_fusion import (
    ModalityFusionBackbone,
    ModalityFusionForSemanticSegmentation,
    ModalityFusionModel,
)
from vitweave.modeling.modeling_modality_translation import ModalityFusionForImageToImage
from vitweave.modeling.modeling_multi_encoder import (
    MultiEncoderBackbone,
    MultiEncoderForImageClassification,
    MultiEncoderModel,
)
from vitweave.modeling.modeling_multi_encoder_vlm import MultiEncoderVlmForConditionalGeneration, MultiEncoderVlmModel
from vitweave.modeling.modeling_specialized_vit import (
    SpecializedViTBackbone,
    SpecializedViTForImageClassification,
    SpecializedViTModel,
)
from vitweave.processing.image_processing_depth import DepthImageProcessor
from vitweave.processing.image_processing_figure import FigureImageProcessor
from vitweave.processing.image_processing_modality import ModalityImageProcessor
from vitweave.processing.image_processing_multi_encoder import MultiEncoderImageProcessor
from vitweave.processing.image_processing_pil_depth import DepthImageProcessorPil
from vitweave.processing.image_processing_pil_figure import FigureImageProcessorPil
from vitweave.processing.image_processing_pil_modality import ModalityImageProcessorPil
from vitweave.processing.image_processing_pil_multi_encoder import MultiEncoderImageProcessorPil
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
from vitweave.processing.image_processing_segmentation import SegmentationImageProcessor
from vitweave.processing.processing_figure_text import FigureTextProcessor
from vitweave.processing.processing_multi_encoder_vlm import MultiEncoderVlmProcessor

TILES = {"torchvision": MultiEncoderImageProcessor, "pil": MultiEncoderImageProcessorPil}

# config class, {Auto class: model class}, image processors by backend, one dict per task (None: the host's own is kept)
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
    (Eva02DetConfig, {AutoModel: Eva02DetModel, AutoBackbone: Eva02DetBackbone}, None),
    (
        LayerFusionConfig,
        {
            AutoModel: LayerFusionModel,
            AutoBackbone: LayerFusionBackbone,
            AutoModelForImageClassification: LayerFusionForImageClassification,
        },
        None,
    ),
    (
        MultiEncoderConfig,
        {
            AutoModel: MultiEncoderModel,
            AutoBackbone: MultiEncoderBackbone,
            AutoModelForImageClassification: MultiEncoderForImageClassification,
        },
        (TILES,),
    ),
    (
        ModalityFusionConfig,
        {
            AutoModel: ModalityFusionModel,
            AutoBackbone: ModalityFusionBackbone,
            AutoModelForSemanticSegmentation: ModalityFusionForSemanticSegmentation,
            AutoModelForImageToImage: ModalityFusionForImageToImage,
        },
        ({"torchvision": ModalityImageProcessor, "pil": ModalityImageProcessorPil},),
    ),
    (
        MultiEncoderVlmConfig,
        {AutoModelForImageTextToText: MultiEncoderVlmForConditionalGeneration, AutoModel: MultiEncoderVlmModel},
        (TILES,),
    ),
    (
        ImageTextRetrieverConfig,
        {AutoModelForZeroShotImageClassification: ImageTextRetrieverModel, AutoModel: ImageTextRetrieverModel},
        ({"torchvision": FigureImageProcessor, "pil": FigureImageProcessorPil},),
    ),
    (
        DensePredictorConfig,
        {
            AutoModelForSemanticSegmentation: DensePredictorForSemanticSegmentation,
            AutoModelForDepthEstimation: DensePredictorForDepthEstimation,
        },
        (
            {"torchvision": SegmentationImageProcessor, "pil": SegmentationImageProcessorPil},
            {"torchvision": DepthImageProcessor, "pil": DepthImageProcessorPil},
        ),
    ),
)


def register():
    """Make every vitweave type known to transformers' Auto classes; repeating it changes nothing."""
    for config_class, models, image_processors in FAMILIES:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, model_class in models.items():
            auto_class.register(config_class, model_class, exist_ok=True)
        for index, by_backend in enumerate(image_processors or ()):
            # A saved processor is looked up by its class name among all that is registered; what stands as the key only
            # serves folders that name no class, and those get the first.
            key = config_class if index == 0 else by_backend["torchvision"]
            AutoImageProcessor.register(key, image_processor_classes=by_backend, exist_ok=True)
    AutoProcessor.register(ImageTextRetrieverConfig, FigureTextProcessor, exist_ok=True)
    AutoProcessor.register(MultiEncoderVlmConfig, MultiEncoderVlmProcessor, exist_ok=True)

"""vitweave: woven vision encoders for Hugging Face transformers. Importing it registers them with the Auto classes."""

from importlib import import_module

from vitweave.auto import register

__version__ = "0.1.0"

# Public names and where they are defined; imported when they are first asked for.
PUBLIC = {
    "AttentiveProbe": "vitweave.modeling.heads.attentive_probe",
    "AveragePrecision": "vitweave.training.detection_metrics",
    "CachedFeatures": "vitweave.training.feature_cache",
    "ClassificationAugmentation": "vitweave.processing.crop_augmentation",
    "ConfusionMatrix": "vitweave.training.metrics",
    "DensePredictorConfig": "vitweave.configuration.configuration_dense_predictor",
    "DensePredictorForDepthEstimation": "vitweave.modeling.modeling_depth",
    "DensePredictorForSemanticSegmentation": "vitweave.modeling.modeling_dense_predictor",
    "DepthAugmentation": "vitweave.processing.depth_augmentation",
    "DepthDataset": "vitweave.training.depth_data",
    "DepthImageProcessor": "vitweave.processing.image_processing_depth",
    "DepthImageProcessorPil": "vitweave.processing.image_processing_pil_depth",
    "DepthMetrics": "vitweave.training.depth_metrics",
    "DetectionDataset": "vitweave.training.detection_data",
    "Eva02DetBackbone": "vitweave.modeling.modeling_eva02_det",
    "Eva02DetConfig": "vitweave.configuration.configuration_eva02_det",
    "Eva02DetModel": "vitweave.modeling.modeling_eva02_det",
    "FigureImageProcessor": "vitweave.processing.image_processing_figure",
    "FigureImageProcessorPil": "vitweave.processing.image_processing_pil_figure",
    "FigureTextProcessor": "vitweave.processing.processing_figure_text",
    "ImageClassificationDataset": "vitweave.training.classification_data",
    "ImageTextRetrieverConfig": "vitweave.configuration.configuration_image_text_retriever",
    "ImageTextRetrieverModel": "vitweave.modeling.modeling_image_text_retriever",
    "LayerFusionBackbone": "vitweave.modeling.modeling_layer_fusion",
    "LayerFusionConfig": "vitweave.configuration.configuration_layer_fusion",
    "LayerFusionForImageClassification": "vitweave.modeling.modeling_layer_fusion",
    "LayerFusionModel": "vitweave.modeling.modeling_layer_fusion",
    "MirroredSamples": "vitweave.training.mirrored_samples",
    "ModalityAugmentation": "vitweave.training.modality_data",
    "ModalityDataset": "vitweave.training.modality_data",
    "ModalityFolder": "vitweave.training.modality_data",
    "ModalityFusionBackbone": "vitweave.modeling.modeling_modality_fusion",
    "ModalityFusionConfig": "vitweave.configuration.configuration_modality_fusion",
    "ModalityFusionForImageToImage": "vitweave.modeling.modeling_modality_translation",
    "ModalityFusionForSemanticSegmentation": "vitweave.modeling.modeling_modality_fusion",
    "ModalityFusionModel": "vitweave.modeling.modeling_modality_fusion",
    "ModalityImageProcessorPil": "vitweave.processing.image_processing_pil_modality",
    "MultiEncoderBackbone": "vitweave.modeling.modeling_multi_encoder",
    "MultiEncoderConfig": "vitweave.configuration.configuration_multi_encoder",
    "MultiEncoderForImageClassification": "vitweave.modeling.modeling_multi_encoder",
    "MultiEncoderImageProcessor": "vitweave.processing.image_processing_multi_encoder",
    "MultiEncoderImageProcessorPil": "vitweave.processing.image_processing_pil_multi_encoder",
    "MultiEncoderModel": "vitweave.modeling.modeling_multi_encoder",
    "MultiEncoderVlmConfig": "vitweave.configuration.configuration_multi_encoder_vlm",
    "MultiEncoderVlmForConditionalGeneration": "vitweave.modeling.modeling_multi_encoder_vlm",
    "MultiEncoderVlmModel": "vitweave.modeling.modeling_multi_encoder_vlm",
    "MultiEncoderVlmProcessor": "vitweave.processing.processing_multi_encoder_vlm",
    "RetrievalDataset": "vitweave.training.retrieval_data",
    "SegmentationAugmentation": "vitweave.processing.augmentation",
    "SegmentationDataset": "vitweave.training.segmentation_data",
    "SegmentationImageProcessor": "vitweave.processing.image_processing_segmentation",
    "SegmentationImageProcessorPil": "vitweave.processing.image_processing_pil_segmentation",
    "SpecializedViTBackbone": "vitweave.modeling.modeling_specialized_vit",
    "SpecializedViTConfig": "vitweave.configuration.configuration_specialized_vit",
    "SpecializedViTForImageClassification": "vitweave.modeling.modeling_specialized_vit",
    "SpecializedViTModel": "vitweave.modeling.modeling_specialized_vit",
    "VisionEncoder": "vitweave.modeling.vision_encoder",
    "VisionFeatures": "vitweave.modeling.vision_encoder",
    "VlmCollator": "vitweave.training.vlm_data",
    "VlmDataset": "vitweave.training.vlm_data",
    "VlmRecords": "vitweave.training.vlm_records",
    "boxes_from_mask": "vitweave.processing.boxes",
    "cache_features": "vitweave.training.feature_cache",
    "compare_fusions": "vitweave.analysis.fusion_comparison",
    "convert_multi_encoder": "vitweave.modeling.convert_multi_encoder",
    "encode_images": "vitweave.training.probe_features",
    "evaluate_classification": "vitweave.training.classification_evaluation",
    "evaluate_depth": "vitweave.training.depth_evaluation",
    "evaluate_knn": "vitweave.training.knn",
    "evaluate_modalities": "vitweave.training.modality_evaluation",
    "evaluate_retrieval": "vitweave.training.retrieval_evaluation",
    "evaluate_segmentation": "vitweave.training.segmentation_evaluation",
    "evaluate_translation": "vitweave.training.translation_evaluation",
    "export": "vitweave.hub.export",
    "generate_captions": "vitweave.training.vlm_captions",
    "inspect_model": "vitweave.analysis.report",
    "lora_config": "vitweave.training.lora",
    "model_cost": "vitweave.analysis.cost",
    "multi_encoder_preset": "vitweave.configuration.multi_encoder_presets",
    "pointing_test": "vitweave.training.pointing",
    "predict_depth": "vitweave.training.depth_evaluation",
    "predict_modalities": "vitweave.training.modality_data",
    "probe_classifier": "vitweave.training.probe_classifier",
    "sliding_window_logits": "vitweave.processing.sliding_window",
    "train_attentive_probe": "vitweave.training.attentive_probes",
    "train_causal_tokenizer": "vitweave.training.small_language_model",
    "train_classification": "vitweave.training.classification",
    "train_depth": "vitweave.training.depth",
    "train_detection": "vitweave.training.detection",
    "train_linear_probes": "vitweave.training.linear_probes",
    "train_retrieval": "vitweave.training.retrieval",
    "train_segmentation": "vitweave.training.segmentation",
    "train_tokenizer": "vitweave.training.text_tokenizer",
    "train_vlm": "vitweave.training.vlm",
    "write_depth_rows": "vitweave.training.pictures",
    "write_translations": "vitweave.training.translation_pictures",
}

register()


def __getattr__(name: str):
    if name not in PUBLIC:
        raise AttributeError(f"module 'vitweave' has no attribute {name!r}; public names: {sorted(PUBLIC)}")
    return getattr(import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})

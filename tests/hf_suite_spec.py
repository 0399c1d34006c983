"""What transformers' own common tests need to know about our classes.

Read by a runner that builds transformers' test mixins around out-of-tree classes (`--spec tests/hf_suite_spec.py`).
"""

import copy
import importlib
from dataclasses import replace
from unittest import mock

import torch
from hf_model_suite import ModelSuiteSpec
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BitImageProcessorPil,
    Dinov2Config,
    DistilBertConfig,
    DPTImageProcessorPil,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SegformerConfig,
    SwinConfig,
)
from transformers.utils import is_torchvision_available

import vitweave  # noqa: F401  (registers the classes)
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
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
from vitweave.processing.image_processing_segmentation import SegmentationImageProcessor

SIZE = {"height": 30, "width": 30}
TINY_VIT = {
    "image_size": 30,
    "patch_size": 6,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "use_mask_token": False,
    "attn_implementation": "eager",
}


def tiny_vit(**changes) -> SpecializedViTConfig:
    return SpecializedViTConfig(**TINY_VIT | {"qkv_blocks": 1, "proj_blocks": 1, "mlp_blocks": 1} | changes)


def mismatched_shapes_with_switches(self):
    """The mixin sets every option with "layer_scale" in its name to 1e-10; ours is a switch and keeps its value."""
    common = importlib.import_module("tests.test_modeling_common")

    def small_init(config):
        config = copy.deepcopy(config)
        if hasattr(config, "initializer_range"):
            config.initializer_range = 1e-10
        return config

    with mock.patch.object(common, "_config_zero_init", small_init):
        common.ModelTesterMixin.test_can_load_ignoring_mismatched_shapes(self)


def pixels(batch: int = 13, size: tuple[int, int] = (30, 30)) -> dict:
    return {"pixel_values": torch.rand(batch, 3, *size)}


def specialized_vit(name: str, skips: dict | None = None, **changes) -> ModelSuiteSpec:
    prefix = tiny_vit(**changes).num_prefix_tokens
    return ModelSuiteSpec(
        name=name,
        config_class=SpecializedViTConfig,
        make_config=lambda: tiny_vit(**changes),
        make_inputs=lambda config: pixels(),
        other_inputs=lambda config: pixels(2, (42, 24)),
        model_classes=[SpecializedViTModel, SpecializedViTForImageClassification, SpecializedViTBackbone],
        base_model_classes=[SpecializedViTModel],
        backbone_classes=[SpecializedViTBackbone],
        classification_classes=[SpecializedViTForImageClassification],
        seq_length=25 + prefix,
        tester_attrs={"num_masks": 13, "mask_length": 25},
        config_kwargs={"hidden_size": 36},
        skips=skips or {},
        overrides={"test_can_load_ignoring_mismatched_shapes": mismatched_shapes_with_switches},
        pipelines={
            "image-classification": SpecializedViTForImageClassification,
            "image-feature-extraction": SpecializedViTModel,
        },
        pipeline_image_processor=lambda: BitImageProcessorPil(size=SIZE, crop_size=SIZE),
    )


def eva02_det(name: str, window_blocks: list[int], skips: dict | None = None) -> ModelSuiteSpec:
    def config() -> Eva02DetConfig:
        shared = {key: TINY_VIT[key] for key in TINY_VIT if key in Eva02DetConfig().to_dict()}
        return Eva02DetConfig(
            **shared,
            attn_implementation="eager",
            pretrain_image_size=24,
            window_size=3,
            window_blocks=window_blocks,
            drop_path_rate=0.1,
        )

    return ModelSuiteSpec(
        name=name,
        config_class=Eva02DetConfig,
        make_config=config,
        make_inputs=lambda config: pixels(),
        other_inputs=lambda config: pixels(2, (42, 24)),
        model_classes=[Eva02DetModel, Eva02DetBackbone],
        base_model_classes=[Eva02DetModel],
        backbone_classes=[Eva02DetBackbone],
        seq_length=25,
        config_kwargs={"hidden_size": 64},
        skips=skips or {},
        pipelines={"image-feature-extraction": Eva02DetModel},
        pipeline_image_processor=lambda: BitImageProcessorPil(size=SIZE, crop_size=SIZE),
    )


def dense_predictor(name: str, backbone, head_type: str) -> ModelSuiteSpec:
    skips = {"test_correct_missing_keys": "the folder of a backbone has no head's config; from_backbone opens that"}
    processors = {"torchvision": SegmentationImageProcessor} if is_torchvision_available() else {}
    if not processors:
        skips["test_new_models_require_torchvision_backend"] = "torchvision is not installed"
        skips["test_image_processor_save_load_with_autoimageprocessor"] = "at 5.13 this one needs torchvision"
    return ModelSuiteSpec(
        name=name,
        config_class=DensePredictorConfig,
        make_config=lambda: DensePredictorConfig(backbone_config=backbone(), head_type=head_type, num_labels=3),
        make_inputs=lambda config: pixels(),
        other_inputs=lambda config: pixels(2, (42, 24)),
        model_classes=[DensePredictorForSemanticSegmentation],
        segmentation_classes=[DensePredictorForSemanticSegmentation],
        is_composite=True,
        tester_attrs={"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "image_size": 30}
        | {"seq_length": 26, "num_masks": 13, "mask_length": 25},
        config_kwargs={"ignore_index": 7},
        config_common_properties=["ignore_index"],
        image_processors={**processors, "pil": SegmentationImageProcessorPil},
        image_processor_kwargs={"size": {"height": 20, "width": 20}},
        skips=skips,
        overrides={"test_can_load_ignoring_mismatched_shapes": mismatched_shapes_with_switches},
        pipelines={"image-segmentation": DensePredictorForSemanticSegmentation},
    )


def depths(config, inputs: dict) -> dict:
    size = (len(inputs["pixel_values"]), *inputs["pixel_values"].shape[2:])
    return {"labels": 12 * torch.rand(size, generator=torch.Generator().manual_seed(0)) - 3}


def depth_predictor(name: str, backbone, head_type: str, **options) -> ModelSuiteSpec:
    return ModelSuiteSpec(
        name=name,
        config_class=DensePredictorConfig,
        make_config=lambda: DensePredictorConfig(backbone_config=backbone(), head_type=head_type, **options),
        make_inputs=lambda config: pixels(),
        other_inputs=lambda config: pixels(2, (42, 24)),
        model_classes=[DensePredictorForDepthEstimation],
        labels={DensePredictorForDepthEstimation: depths},
        is_composite=True,
        tester_attrs={"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "image_size": 30}
        | {"seq_length": 26, "num_masks": 13, "mask_length": 25},
        config_kwargs={"max_depth": 80.0},
        config_common_properties=["max_depth"],
        skips={"test_correct_missing_keys": "the folder of a backbone has no head's config; from_backbone opens that"},
        overrides={"test_can_load_ignoring_mismatched_shapes": mismatched_shapes_with_switches},
        pipelines={"depth-estimation": DensePredictorForDepthEstimation},
        pipeline_image_processor=lambda: DPTImageProcessorPil(size=SIZE),
    )


def layer_fusion(name: str, encoder, fusion_type: str, backbone: bool = False, **options) -> ModelSuiteSpec:
    skips = {
        "test_attention_outputs": "the attentions are those of the fusion, not one per layer of the encoder",
        "test_retain_grad_hidden_states_attentions": "the tokens do not depend on the fusion's attentions",
    }
    if backbone:
        skips["test_backbone_stage_selection"] = "asks for the last two maps of one"
        skips["test_config"] = "its maps are those of the fusion, not one per layer"
    classifiers = [] if backbone else [LayerFusionForImageClassification]
    return ModelSuiteSpec(
        name=name,
        config_class=LayerFusionConfig,
        make_config=lambda: LayerFusionConfig(
            encoder_config=encoder(), layers=[1, 2], fusion_type=fusion_type, fusion_options=options, num_labels=3
        ),
        make_inputs=lambda config: pixels(),
        other_inputs=lambda config: pixels(2, (42, 24)),
        # a fusion of patches has a read-out that a classifier would leave without gradient
        model_classes=[LayerFusionBackbone] if backbone else [LayerFusionModel, *classifiers],
        base_model_classes=[] if backbone else [LayerFusionModel],
        backbone_classes=[LayerFusionBackbone] if backbone else [],
        classification_classes=classifiers,
        is_composite=True,
        tester_attrs={"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "image_size": 30}
        | {"seq_length": 26, "num_masks": 13, "mask_length": 25},
        config_kwargs={"fusion_type": "concat"},
        config_common_properties=["fusion_type"],
        skips=skips,
        overrides={"test_can_load_ignoring_mismatched_shapes": mismatched_shapes_with_switches},
        pipelines={}
        if backbone
        else {
            "image-classification": LayerFusionForImageClassification,
            "image-feature-extraction": LayerFusionModel,
        },
        pipeline_image_processor=lambda: BitImageProcessorPil(size=SIZE, crop_size=SIZE),
    )


def pairs(batch: int = 13, size: tuple[int, int] = (30, 30)) -> dict:
    ids = torch.randint(1, 99, (batch, 7))
    return pixels(batch, size) | {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "sentence_ids": (torch.arange(7) // 3).repeat(batch, 1),
    }


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "This", "is", "a", "photo", "of", "cat", "plane", "remote"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def retriever(name: str, vision, skip: dict | None = None, **options) -> ModelSuiteSpec:
    # its attention is one module, as the check of the attention interface expects
    text = DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=37)
    skips = {
        name: "hidden states and attentions come with get_image_features and get_text_features"
        for name in ("test_hidden_states_output", "test_retain_grad_hidden_states_attentions", "test_attention_outputs")
    }
    return ModelSuiteSpec(
        name=name,
        config_class=ImageTextRetrieverConfig,
        make_config=lambda: ImageTextRetrieverConfig(
            vision_config=vision(), text_config=copy.deepcopy(text), projection_dim=16, **options
        ),
        make_inputs=lambda config: pairs(),
        other_inputs=lambda config: pairs(2, (42, 24)),
        model_classes=[ImageTextRetrieverModel],
        base_model_classes=[ImageTextRetrieverModel],
        is_composite=True,
        tester_attrs={"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "image_size": 30}
        | {"seq_length": 7, "key_length": 7},
        config_kwargs={"projection_dim": 8},
        config_common_properties=["projection_dim"],
        pipelines={"zero-shot-image-classification": ImageTextRetrieverModel},
        pipeline_image_processor=lambda: BitImageProcessorPil(size=SIZE, crop_size=SIZE),
        tokenizer=tiny_tokenizer,
        class_attrs={"additional_model_inputs": ["input_ids", "sentence_ids"]},
        skips=skips | (skip or {}),
        overrides={"test_can_load_ignoring_mismatched_shapes": mismatched_shapes_with_switches},
    )


def tiny_fusion() -> LayerFusionConfig:
    return LayerFusionConfig(encoder_config=tiny_vit(), layers=[1, 2], fusion_type="film")


def tiny_dinov2() -> Dinov2Config:
    options = {name: value for name, value in TINY_VIT.items() if name != "attn_implementation"}
    return Dinov2Config(**options, out_indices=[1, 2])


def tiny_tower(**options) -> MultiEncoderConfig:
    """Encoders whose attention is one module per layer, as the check of the attention interface expects."""
    encoders = [tiny_vit(), tiny_dinov2()]
    return MultiEncoderConfig(encoder_configs=encoders, image_size=30, hidden_size=64, **options)


def multi_encoder(name: str, backbone: bool = False, **options) -> ModelSuiteSpec:
    skips = {
        "test_attention_outputs": "attentions are those of several encoders, which are not returned",
        "test_hidden_states_output": "one hidden state, the fused tokens",
        "test_retain_grad_hidden_states_attentions": "attentions are not returned",
    }
    if backbone:
        skips["test_backbone_stage_selection"] = "asks for the last two maps of one"
        skips["test_config_save_pretrained"] = "asks for four maps of one"
    skips["test_config"] = "looks for encoder_0 ... in the config.json, where they are a list"
    return ModelSuiteSpec(
        name=name,
        config_class=MultiEncoderConfig,
        make_config=lambda: tiny_tower(num_labels=3, **options),
        make_inputs=lambda config: pixels(),
        other_inputs=lambda config: pixels(2, (42, 24)),
        model_classes=[MultiEncoderBackbone] if backbone else [MultiEncoderModel, MultiEncoderForImageClassification],
        base_model_classes=[] if backbone else [MultiEncoderModel],
        backbone_classes=[MultiEncoderBackbone] if backbone else [],
        classification_classes=[] if backbone else [MultiEncoderForImageClassification],
        is_composite=True,
        tester_attrs={"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "image_size": 30}
        | {"seq_length": 25, "num_masks": 13, "mask_length": 25},
        has_attentions=not backbone,
        config_kwargs={"fusion_type": "add"},
        config_common_properties=["fusion_type"],
        skips=skips,
        overrides={"test_can_load_ignoring_mismatched_shapes": mismatched_shapes_with_switches},
        pipelines={}
        if backbone
        else {
            "image-classification": MultiEncoderForImageClassification,
            "image-feature-extraction": MultiEncoderModel,
        },
        pipeline_image_processor=lambda: BitImageProcessorPil(size=SIZE, crop_size=SIZE),
    )


def tiny_mit() -> SegformerConfig:
    sizes = {"hidden_sizes": [32, 32], "depths": [1, 1], "num_attention_heads": [4, 4], "sr_ratios": [2, 1]}
    sizes |= {"num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    return SegformerConfig(**sizes, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)


def modalities(batch: int = 13, size: tuple[int, int] = (32, 32)) -> dict:
    return {"pixel_values": torch.rand(batch, 2, 3, *size)}


def config_of_stages(self):
    """The config's own tests; the backbones' of that name wants a map per layer, and ours are those of the stages."""
    if hasattr(self, "all_model_classes"):
        self.skipTest("the maps are those of the stages, not one per layer")
    common = importlib.import_module("tests.test_configuration_common")
    options = {"decoder_hidden_size": 16, "reconstruction_weight": 1.0}
    tester = common.ConfigTester(self, ModalityFusionConfig, False, common_properties=list(options), **options)
    tester.run_common_tests()


def modality_fusion(name: str, stream, **options) -> ModelSuiteSpec:
    def config() -> ModalityFusionConfig:
        return ModalityFusionConfig(stream_config=stream(), decoder_hidden_size=32, num_labels=3, **options)

    def labels(config, inputs: dict) -> dict:
        images = inputs["pixel_values"]  # drawn anew for every call, and the test of tuples compares two calls
        generator = torch.Generator().manual_seed(0)
        return {"labels": torch.randint(0, 3, (len(images), *images.shape[-2:]), generator=generator)}

    return ModelSuiteSpec(
        name=name,
        config_class=ModalityFusionConfig,
        make_config=config,
        make_inputs=lambda config: modalities(),
        other_inputs=lambda config: modalities(2, (40, 24)),
        model_classes=[ModalityFusionModel, ModalityFusionBackbone, ModalityFusionForSemanticSegmentation],
        base_model_classes=[ModalityFusionModel],
        backbone_classes=[ModalityFusionBackbone],
        segmentation_classes=[ModalityFusionForSemanticSegmentation],
        labels={ModalityFusionForSemanticSegmentation: labels},
        is_composite=True,
        has_attentions=False,
        tester_attrs={"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "image_size": 32}
        | {"seq_length": 16, "num_masks": 13, "mask_length": 16},
        skips={
            "test_hidden_states_output": "the hidden states are the maps of the stages",
            "test_retain_grad_hidden_states_attentions": "attentions are not returned",
        },
        overrides={
            "test_can_load_ignoring_mismatched_shapes": mismatched_shapes_with_switches,
            "test_config": config_of_stages,
        },
    )


def tiny_swin() -> SwinConfig:
    sizes = {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "mlp_ratio": 2, "window_size": 4}
    return SwinConfig(image_size=32, patch_size=4, **sizes, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)


def translation(name: str, stream=tiny_mit, **options) -> ModelSuiteSpec:
    common = modality_fusion(name, stream, **options)

    def images(config, inputs: dict) -> dict:
        return {"labels": inputs["pixel_values"][:, 1]}

    return replace(
        common,
        model_classes=[ModalityFusionForImageToImage],
        base_model_classes=[],
        backbone_classes=[],
        segmentation_classes=[],
        labels={ModalityFusionForImageToImage: images},
    )


def questions(batch: int = 13) -> dict:
    """Two words, an image of 25 tokens, five words."""
    words = torch.randint(5, 99, (batch, 32))
    words[:, 2:27] = 3
    return pixels(batch) | {"input_ids": words, "attention_mask": torch.ones_like(words)}


def vlm(name: str, **options) -> ModelSuiteSpec:
    skips = {
        f"test_model_rope_scaling_from_config_{kind}": "its random texts hold image tokens, but it has no images"
        for kind in ("0_linear", "1_dynamic", "2_yarn")
    }
    skips["test_generation_tester_mixin_inheritance"] = "the runner has no generation mixin; generation has own tests"
    skips["test_get_image_features_attentions"] = "the attentions of several encoders are not returned"
    skips["test_get_image_features_hidden_states"] = "one hidden state, the fused tokens"
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    return ModelSuiteSpec(
        name=name,
        config_class=MultiEncoderVlmConfig,
        make_config=lambda: MultiEncoderVlmConfig(
            vision_config=tiny_tower(), text_config=copy.deepcopy(text), image_token_id=3, **options
        ),
        make_inputs=lambda config: questions(),
        model_classes=[MultiEncoderVlmModel, MultiEncoderVlmForConditionalGeneration],
        base_model_classes=[MultiEncoderVlmModel],
        is_composite=True,
        seq_length=32,
        tester_attrs={"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "image_size": 30}
        | {"encoder_seq_length": 32, "key_length": 32, "vocab_size": 99},
        config_kwargs={"projector_type": "linear"},
        config_common_properties=["projector_type"],
        class_attrs={"additional_model_inputs": ["pixel_values"]},
        labels={MultiEncoderVlmForConditionalGeneration: lambda config, inputs: {"labels": inputs["input_ids"]}},
        skips=skips,
        overrides={"test_can_load_ignoring_mismatched_shapes": mismatched_shapes_with_switches},
    )


def specs() -> list[ModelSuiteSpec]:
    return [
        specialized_vit("specialized_vit"),
        specialized_vit("specialized_vit_registers", num_register_tokens=2, register_role="cls", use_swiglu_ffn=True),
        specialized_vit("specialized_vit_rotary", position_embedding_type="rotary", layerscale_value=None, cls_rank=2),
        specialized_vit(
            "class_attention_vit",
            skips={"test_attention_outputs": "the blocks see no class token, so their attention maps lack it"},
            class_attention_layers=1,
            qkv_blocks="none",
            proj_blocks="none",
            mlp_blocks="none",
        ),
        eva02_det("eva02_det", window_blocks=[1]),
        layer_fusion("layer_fusion_probe", tiny_vit, "attentive_probe"),
        layer_fusion("layer_fusion_dinov2", tiny_dinov2, "concat", include_mean_patch=True),
        layer_fusion("layer_fusion_maps", tiny_dinov2, "cross_layer_attention", backbone=True, dense=True, num_heads=4),
        retriever("image_text_retriever", tiny_vit, local_loss_weight=0.5),
        retriever(
            "image_text_retriever_fused",
            tiny_fusion,
            {"test_get_image_features_attentions": "the attentions of this tower are its fusion's, and it has none"},
            local_loss_weight=0.5,
            contrastive_loss="siglip",
        ),
        modality_fusion("modality_fusion_mit", tiny_mit, fusion_type="gemini"),
        modality_fusion("modality_fusion_swin", tiny_swin, fusion_type="token_exchange"),
        modality_fusion("modality_fusion_vit", tiny_dinov2, fusion_type="gemini"),
        modality_fusion("modality_fusion_specialized_vit", tiny_vit, fusion_type="cross_attention"),
        translation("modality_fusion_translation", fusion_type="token_exchange"),
        translation("modality_fusion_translation_swin", tiny_swin, fusion_type="gemini"),
        translation("modality_fusion_translation_vit", tiny_dinov2, fusion_type="token_exchange"),
        multi_encoder("multi_encoder_vision"),
        multi_encoder("multi_encoder_maps", backbone=True),
        vlm("multi_encoder_vlm"),
        dense_predictor("dense_predictor", lambda: tiny_vit(out_indices=[1, 2]), "linear"),
        dense_predictor("dense_predictor_dinov2", tiny_dinov2, "mlp"),
        depth_predictor("depth_predictor", lambda: tiny_vit(out_indices=[1, 2]), "linear"),
        depth_predictor("depth_predictor_dinov2", tiny_dinov2, "dpt", depth_target="disparity"),
        depth_predictor("depth_predictor_regression", lambda: tiny_vit(out_indices=[1, 2]), "regression"),
    ]

"""The heads that exist, on a tower of two encoders: segmentation, retrieval, classification, layer fusion."""

import pytest
import torch
from retrieval_models import pairs, text_config
from tiny_encoders import CASES, build

from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.configuration_image_text_retriever import ImageTextRetrieverConfig
from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig
from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.modeling_image_text_retriever import ImageTextRetrieverModel
from vitweave.modeling.modeling_layer_fusion import LayerFusionModel
from vitweave.modeling.modeling_multi_encoder import MultiEncoderForImageClassification, MultiEncoderModel
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
from vitweave.training.segmentation import train_segmentation
from vitweave.training.segmentation_data import SegmentationDataset
from vitweave.training.synthetic_shapes import SyntheticShapes

ENCODERS = [{"model_type": "dinov2", **CASES["dinov2"]}, {"model_type": "convnext", **CASES["convnext"]}]
SEQUENCES = {"query_former": {"width": 32, "encoder_hidden_size": 32, "depth": 1, "num_heads": 2}}


def tower(fusion_type="add", fusion_options=None, frozen=False) -> MultiEncoderConfig:
    sizes = [{"frozen": frozen}, {"frozen": frozen, "image_size": 128}]
    return MultiEncoderConfig(
        encoder_configs=ENCODERS,
        encoder_options=sizes,
        image_size=32,
        fusion_type=fusion_type,
        fusion_options=fusion_options or SEQUENCES.get(fusion_type),
    )


def retriever(vision: MultiEncoderConfig, **options) -> ImageTextRetrieverModel:
    torch.manual_seed(0)
    config = ImageTextRetrieverConfig(
        vision_config=vision, text_config=text_config(), projection_dim=16, local_loss_weight=0.5, **options
    )
    return ImageTextRetrieverModel(config)


def without_gradient(model) -> set[str]:
    return {
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and (weight.grad is None or not weight.grad.any())
    }


@pytest.mark.parametrize("cached", [False, True])
def test_segmentation_trains_fusion_and_head(tmp_path, cached):
    torch.manual_seed(0)
    config = DensePredictorConfig(
        backbone_config=tower("deformable", {"num_heads": 2}, frozen=True), id2label=SyntheticShapes.id2label
    )
    model = DensePredictorForSemanticSegmentation(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    processor = SegmentationImageProcessorPil(size=32)
    parts = [SegmentationDataset(SyntheticShapes(4, seed=seed), processor) for seed in (0, 1)]
    quiet = {"disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 2, "max_steps": 3}
    folder = tmp_path / "features" if cached else None
    metrics = train_segmentation(model, *parts, processor, tmp_path / "run", cache_features=folder, **quiet)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(".fusion." in name for name in moved) and any("head" in name for name in moved)
    assert not any("encoder_" in name for name in moved)
    assert 0 <= metrics["mean_iou"] <= 1


def test_retrieval_reaches_both_encoders_and_the_fusion(tmp_path):
    model = retriever(tower("add", {"direct": True}))
    output = model(**pairs(), return_loss=True)
    assert output.image_embeds.shape == (4, 16)
    output.loss.backward()
    # transformers' ConvNeXt has a norm for its pooled output, which a tower does not read
    idle = {name for name in without_gradient(model) if "mask_token" not in name}
    assert idle == {f"vision_model.encoder_1.model.layernorm.{part}" for part in ("weight", "bias")}
    model.eval().save_pretrained(tmp_path)
    loaded = ImageTextRetrieverModel.from_pretrained(tmp_path).eval()
    pixels = pairs()["pixel_values"]
    assert torch.equal(loaded(**pairs()).logits_per_image, model(**pairs()).logits_per_image)
    fused = model.vision_model(pixels)
    assert torch.equal(model.tower.encoder(pixels).pooled, fused.pooler_output)


def test_a_tower_without_a_map_is_refused():
    with pytest.raises(ValueError, match="keeps a grid, got 'query_former'"):
        retriever(tower("query_former"))


@pytest.mark.parametrize("fusion_type", ["query_former", "add"])
def test_loaded_encoders_under_a_classifier_keep_their_weights(fusion_type):
    models = [build("dinov2"), build("convnext")]
    before = [{name: weight.clone() for name, weight in model.state_dict().items()} for model in models]
    model = MultiEncoderForImageClassification.from_encoders(
        models,
        encoder_options=[{}, {"image_size": 128}],
        image_size=32,
        fusion_type=fusion_type,
        fusion_options=SEQUENCES.get(fusion_type),
        num_labels=5,
    )
    for index, kept in enumerate(before):
        assert model.multi_encoder.encoders[index].model is models[index]
        assert all(torch.equal(weight, kept[name]) for name, weight in models[index].state_dict().items())
    assert model(torch.randn(2, 3, 32, 32)).logits.shape == (2, 5)
    half = MultiEncoderForImageClassification.from_encoders([models[0].bfloat16()], image_size=32, num_labels=5)
    assert half.classifier.weight.dtype == torch.bfloat16


def test_a_tower_has_one_layer_to_fuse():
    with pytest.raises(ValueError, match="3"):
        LayerFusionModel(LayerFusionConfig(encoder_config=tower(), layers=[1, 3], fusion_type="weighted_sum"))
    model = MultiEncoderModel(tower()).eval()
    fused = LayerFusionModel.from_encoder(model, layers=[1], fusion_type="concat").eval()
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(fused(pixels).pooler_output, model(pixels).pooler_output)

"""Stock transformers composites run over the specialised backbone, and reload with it."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VisionTextDualEncoderModel,
)

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_specialized_vit import SpecializedViTBackbone, SpecializedViTModel

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def backbone_config(**changes) -> SpecializedViTConfig:
    tiny = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 32, "patch_size": 4}
    return SpecializedViTConfig(**tiny | {"mlp_ratio": 2, "out_indices": [1, 2, 3, 4]} | changes)


def upernet():
    config = UperNetConfig(
        backbone_config=backbone_config(), hidden_size=16, auxiliary_in_channels=32, auxiliary_channels=8, num_labels=3
    )
    return UperNetForSemanticSegmentation(config)


def dpt():
    config = DPTConfig(
        backbone_config=backbone_config(reshape_hidden_states=False),
        is_hybrid=False,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        hidden_size=32,
        patch_size=4,
        image_size=32,
    )
    return DPTForDepthEstimation(config)


def mask2former():
    config = Mask2FormerConfig(
        backbone_config=backbone_config(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        num_labels=3,
    )
    return Mask2FormerForUniversalSegmentation(config)


@pytest.mark.parametrize("build", [upernet, dpt, mask2former], ids=lambda build: build.__name__)
def test_runs_and_reloads_over_the_specialized_backbone(build, tmp_path):
    torch.manual_seed(0)
    model = build().eval()
    assert any(isinstance(module, SpecializedViTBackbone) for module in model.modules())
    with torch.no_grad():
        expected = model(PIXELS).to_tuple()[0]
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(PIXELS).to_tuple()[0], expected)


def test_is_the_vision_tower_of_a_dual_encoder(tmp_path):
    torch.manual_seed(0)
    text = BertModel(
        BertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    model = VisionTextDualEncoderModel(vision_model=SpecializedViTModel(backbone_config()), text_model=text).eval()
    inputs = {"pixel_values": PIXELS, "input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    model.save_pretrained(tmp_path)
    loaded = VisionTextDualEncoderModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)

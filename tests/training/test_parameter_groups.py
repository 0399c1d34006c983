"""What is decayed and what learns slower."""

import pytest
import torch
from modality_translators import tiny_generator
from torch import nn
from transformers import (
    BertConfig,
    DetrConfig,
    DetrForObjectDetection,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from vitweave.configuration.configuration_image_text_retriever import ImageTextRetrieverConfig
from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_image_text_retriever import ImageTextRetrieverModel
from vitweave.modeling.modeling_modality_translation import ModalityAdversarialTranslator
from vitweave.training.parameter_groups import find_encoder, is_decayed, parameter_groups


def tiny_segformer():
    torch.manual_seed(0)
    small = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 1, 1]}
    return SegformerForSemanticSegmentation(SegformerConfig(**small, decoder_hidden_size=8, num_labels=3))


@pytest.mark.parametrize(
    ("name", "shape", "decayed"),
    [
        ("encoder.layer.0.attention.q_proj_cls.weight", (4, 4), True),
        ("classifier.weight", (3, 4, 1, 1), True),
        ("classifier.bias", (3,), False),
        ("encoder.layer.0.norm1_cls.weight", (4,), False),
        ("batch_norm.weight", (4,), False),
        ("encoder.layer.0.layer_scale1.lambda1", (4,), False),
        ("encoder.layer.0.attention.bias_k", (2, 4), False),
        ("fusion.layer_embed", (3, 4), False),
        ("fusion.query", (2, 4), False),
        ("attention.query.weight", (4, 4), True),
        ("fusion.edge_logits", (3, 3), False),
        ("embeddings.cls_token", (1, 1, 4), False),
        ("embeddings.position_embeddings", (1, 5, 4), False),
    ],
)
def test_only_matrices_are_decayed(name, shape, decayed):
    assert is_decayed(name, nn.Parameter(torch.zeros(shape))) is decayed


def test_groups_hold_every_trainable_parameter_once():
    model = tiny_segformer()
    model.decode_head.classifier.bias.requires_grad_(False)
    groups = parameter_groups(model, 1e-3, 0.1, encoder_lr_scale=0.1)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    encoder = {id(parameter) for parameter in model.segformer.parameters()}
    for group in groups:
        (inside,) = {id(parameter) in encoder for parameter in group["params"]}
        assert group["lr"] == pytest.approx(1e-4 if inside else 1e-3)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}


def test_the_encoder_of_a_stock_detector_is_its_backbone():
    backbone = SpecializedViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, out_indices=[2]
    )
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 4, "use_timm_backbone": False}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    model = DetrForObjectDetection(DetrConfig(backbone_config=backbone, **small, **heads))
    assert find_encoder(model) is model.model.backbone
    slow = {
        id(one) for group in parameter_groups(model, 1.0, 0.1, 0.5) if group["lr"] == 0.5 for one in group["params"]
    }
    assert slow == {id(one) for one in model.model.backbone.parameters() if one.requires_grad}


def test_a_bare_module_has_no_encoder():
    with pytest.raises(ValueError, match="Linear has neither a backbone"):
        find_encoder(nn.Linear(2, 2))


def test_what_draws_images_has_an_encoder_also_beside_a_discriminator():
    generator = tiny_generator()
    assert find_encoder(generator) is generator.modality_fusion
    both = ModalityAdversarialTranslator.around(generator)
    assert find_encoder(both) is generator.modality_fusion
    slow, fast = 1e-4, 1e-3
    rates = {id(part): group["lr"] for group in parameter_groups(both, fast, 0.0, 0.1) for part in group["params"]}
    embeds = generator.modality_fusion.streams.stages[0].patch_embeddings.proj.weight
    assert rates[id(embeds)] == pytest.approx(slow)
    assert rates[id(both.discriminator.score.weight)] == rates[id(generator.decoder.project.weight)] == fast


def test_fusion_parameters_are_no_matrices_and_learn_like_a_head():
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    fusion = LayerFusionConfig(
        encoder_config=SpecializedViTConfig(**small), layers=[1, 2], fusion_type="layer_self_attention"
    )
    text = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = ImageTextRetrieverModel(ImageTextRetrieverConfig(vision_config=fusion, text_config=text))
    groups = parameter_groups(model, 1e-3, 0.1, encoder_lr_scale=0.1, fusion_lr_scale=10.0)
    places = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    found = {name: places[id(parameter)] for name, parameter in model.named_parameters()}
    for name, (rate, decay) in found.items():
        rates = {"vision_model.encoder.": 1e-4, "vision_model.fusion.": 1e-2}
        expected = next((value for start, value in rates.items() if name.startswith(start)), 1e-3)
        assert rate == pytest.approx(expected), name
        if "gamma" in name or "embed" in name.rpartition(".")[2] or "logit" in name or "_embeddings.weight" in name:
            assert decay == 0, name
    assert found["vision_model.fusion.layer_embed"] == (1e-2, 0.0)
    assert found["visual_projection.weight"] == (1e-3, 0.1)
    assert found["text_model.embeddings.word_embeddings.weight"] == (1e-3, 0.0)

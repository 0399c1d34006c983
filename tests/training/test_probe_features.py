"""Images encoded once serve every probe, and only those that fit."""

import pytest
import torch
from transformers import ConvNextConfig, ViTConfig, ViTImageProcessorPil

from vitweave.modeling.vision_encoder import VisionEncoder
from vitweave.training.attentive_probes import train_attentive_probe
from vitweave.training.classification_data import ImageClassificationDataset
from vitweave.training.knn import evaluate_knn
from vitweave.training.linear_probes import train_linear_probes
from vitweave.training.probe_features import PooledEncoder, TokenEncoder, compute_features, encode_images
from vitweave.training.synthetic_classes import SyntheticClasses

PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
TINY = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
QUIET = {"progress": False}


def tiny_encoder(config=None):
    torch.manual_seed(0)
    return VisionEncoder(config or ViTConfig(**TINY, image_size=32, patch_size=8))


def data(length=12, seed=0):
    return ImageClassificationDataset(SyntheticClasses(length, seed=seed), PROCESSOR)


def test_encoded_images_give_what_the_images_give():
    encoder, parts = tiny_encoder(), (data(), data(6, seed=1))
    encoded = [encode_images(encoder, part, **QUIET) for part in parts]
    assert len(encoded[0]) == 12 and encoded[0].id2label == SyntheticClasses.id2label
    quick = {"steps": 10, "rates": (0.1, 1.0)} | QUIET
    assert (
        train_linear_probes(encoder, *parts, **quick).figures == train_linear_probes(encoder, *encoded, **quick).figures
    )
    assert evaluate_knn(encoder, *parts, ks=(3,), **QUIET) == evaluate_knn(encoder, *encoded, ks=(3,), **QUIET)
    quick = {"epochs": 1, "rates": (0.01,), "num_heads": 2, "num_layers": 2} | QUIET
    figures = [train_attentive_probe(encoder, *given, **quick).figures for given in (parts, encoded)]
    assert figures[0] == figures[1]
    tokens = [encode_images(encoder, part, num_layers=None, **QUIET) for part in parts]
    quick["num_layers"] = None
    assert train_attentive_probe(encoder, *tokens, **quick).best.accuracy <= 1


def test_features_that_do_not_fit_are_refused():
    encoder = tiny_encoder()
    encoded = encode_images(encoder, data(), num_layers=2, **QUIET)
    with pytest.raises(ValueError, match=r"16 channels of 4 layers, got layers of \[16, 16\]; .* num_layers=4"):
        compute_features(PooledEncoder(encoder, 4), encoded)
    with pytest.raises(ValueError, match="all tokens of this encoder's last layer"):
        compute_features(TokenEncoder(encoder), encoded)
    other = tiny_encoder(ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4))
    with pytest.raises(ValueError, match="8 channels of 1 layers"):
        compute_features(PooledEncoder(other), encoded)
    assert len(encode_images(other, data(2), **QUIET).features["class_tokens"]) == 1  # its pooled output alone


def test_a_frozen_encoder_stays_in_eval_mode_and_returns_the_other_as_it_was():
    encoder = tiny_encoder(ViTConfig(**TINY, image_size=32, patch_size=8, hidden_dropout_prob=0.5)).train()
    first, _ = compute_features(PooledEncoder(encoder), data(4), batch_size=3, progress=False)
    again, _ = compute_features(PooledEncoder(encoder), data(4), batch_size=4, progress=False)
    torch.testing.assert_close(first, again)
    assert encoder.model.training and not first["class_tokens"][0].requires_grad
    assert not any(module.training for module in PooledEncoder(encoder).train().modules())


def test_features_kept_on_disk_are_those_of_the_encoder(tmp_path):
    encoder = tiny_encoder()
    plain = encode_images(encoder, data(), num_layers=2, **QUIET)
    built, read = (encode_images(encoder, data(), num_layers=2, cache_folder=tmp_path, **QUIET) for _ in range(2))
    for encoded in (built, read):
        assert torch.equal(encoded.labels, plain.labels) and encoded.id2label == plain.id2label
        for name, parts in plain.features.items():
            for part, expected in zip(encoded.features[name], parts, strict=True):
                torch.testing.assert_close(part, expected)
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert any(tmp_path.rglob("*.safetensors"))

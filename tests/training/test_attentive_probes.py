"""Attentive probes on frozen tokens: what they read, that they learn, and that they are kept."""

import pytest
import torch
from transformers import ConvNextConfig, ViTConfig, ViTImageProcessorPil

from vitweave.modeling.heads.attentive_probe import AttentiveProbe
from vitweave.modeling.vision_encoder import VisionEncoder
from vitweave.training.attentive_probes import (
    TrainedAttentiveProbe,
    fit_attentive_probe,
    probe_tokens,
    score_probe,
    train_attentive_probe,
)
from vitweave.training.classification_data import ImageClassificationDataset
from vitweave.training.probe_features import PooledEncoder, TokenEncoder, compute_features
from vitweave.training.synthetic_classes import SyntheticClasses

PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
TINY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
QUICK = {"epochs": 2, "rates": (1e-3, 1e-2), "num_heads": 2, "progress": False}


def tiny_encoder(config=None):
    torch.manual_seed(0)
    return VisionEncoder(config or ViTConfig(**TINY, image_size=32, patch_size=8))


def data(length=12, seed=0):
    return ImageClassificationDataset(SyntheticClasses(length, seed=seed), PROCESSOR)


def test_what_is_attended_over():
    encoder = tiny_encoder().eval()
    pixels = torch.stack([item["pixel_values"] for item in data(5)])
    with torch.no_grad():
        outputs = encoder.model(pixels, output_hidden_states=True)
        layers = [encoder.model.layernorm(state) for state in outputs.hidden_states[-2:]]
    tokens, labels = compute_features(TokenEncoder(encoder), data(5), batch_size=2, progress=False)
    torch.testing.assert_close(probe_tokens(tokens), outputs.last_hidden_state)
    assert labels.tolist() == [0, 1, 2, 0, 1]
    pooled, _ = compute_features(PooledEncoder(encoder, num_layers=2), data(5), batch_size=2, progress=False)
    expected = [part for state in layers for part in (state[:, 0], state[:, 1:].mean(dim=1))]
    torch.testing.assert_close(probe_tokens(pooled), torch.stack(expected, dim=1))


def test_the_pooled_output_stands_in_for_a_class_token():
    encoder = tiny_encoder(ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4)).eval()
    tokens, _ = compute_features(TokenEncoder(encoder), data(2), progress=False)
    outputs = encoder.model(torch.stack([item["pixel_values"] for item in data(2)]))
    assert probe_tokens(tokens).shape == (2, 1 + 1, 8)  # one patch of 32 pixels
    torch.testing.assert_close(probe_tokens(tokens)[:, 0], outputs.pooler_output.detach())


def test_a_probe_learns_what_only_one_token_says():
    torch.manual_seed(0)
    tokens, labels = torch.randn(256, 6, 16), torch.randint(2, (256,))
    marked = torch.randint(6, (256,))
    tokens[torch.arange(256), marked] = 0.1 * tokens[torch.arange(256), marked]
    tokens[torch.arange(256), marked, 0] += 6.0  # "look here"
    tokens[torch.arange(256), marked, 1] = 6.0 * (2 * labels - 1).float()
    probe = AttentiveProbe(16, 2, num_heads=2)
    options = {"batch_size": 64, "weight_decay": 0.05, "seed": 0, "progress": False}
    before = score_probe(probe.eval(), tokens[:64], labels[:64])
    fit_attentive_probe(tokens[64:], labels[64:], probe, learning_rate=1e-2, steps=60, **options)
    accuracy, loss = score_probe(probe, tokens[:64], labels[:64])
    assert accuracy > 0.95 and loss < before[1] and not probe.training


def test_the_best_rate_is_kept_saved_and_loaded(tmp_path):
    state = torch.random.get_rng_state()
    found = train_attentive_probe(tiny_encoder(), data(), data(6, seed=1), tmp_path, **QUICK)
    torch.random.set_rng_state(state)
    assert len(found.figures) == 2 and found.best.accuracy == max(figure.accuracy for figure in found.figures)
    held_out, truth = compute_features(TokenEncoder(tiny_encoder()), data(6, seed=1), progress=False)
    loaded = TrainedAttentiveProbe.load(tmp_path)
    assert loaded.figures == found.figures and loaded.id2label == SyntheticClasses.id2label
    assert score_probe(loaded.probe, held_out["tokens"], truth) == (found.best.accuracy, found.best.loss)
    again = train_attentive_probe(tiny_encoder(), data(), data(6, seed=1), num_layers=None, **QUICK)
    assert again.figures == found.figures  # nothing but the seed decides
    few = train_attentive_probe(tiny_encoder(), data(), data(6, seed=1), num_layers=2, **QUICK)
    assert few.settings["num_layers"] == 2


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least 2 images"):
        train_attentive_probe(tiny_encoder(), data(), data(6, seed=1), **QUICK, batch_size=1)
    with pytest.raises(ValueError, match="1 to 3 layers, got 4"):
        train_attentive_probe(tiny_encoder(), data(), data(6, seed=1), num_layers=4, **QUICK)
    convnext = tiny_encoder(ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4))
    with pytest.raises(ValueError, match="convnext has no class token"):
        train_attentive_probe(convnext, data(), data(6, seed=1), num_layers=2, **QUICK)
